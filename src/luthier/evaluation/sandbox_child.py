"""The program that runs inside the sandbox: close every wall, prove that they are closed, then run the given code.

Started by :mod:`luthier.evaluation.sandbox` as a script, with the standard library only. It reads its settings (one
JSON line) from standard input, confines itself, and writes ``ready`` to the verdict pipe; only then does the parent
send the code. Where a wall cannot be closed it writes ``refused: <reason>`` and ends, and the code never reaches it.

Walls: an empty set of capabilities and ``no_new_privs``; resource limits; a system-call filter that denies sockets, new
processes, signals to others, tracing, mounting, changes of file metadata and kernel interfaces; and for the file system
one of two, as told:

``namespaces``  a new root made of the read-only folders Python needs and a small memory file system, in mount, network,
                IPC and UTS namespaces (inside a user namespace; root instead takes an unused user id);
``landlock``    the Landlock rules of the kernel: reading those folders, writing the temporary folder, nothing else.
"""

import builtins
import ctypes
import errno
import json
import operator
import os
import platform
import resource
import struct
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

_X86 = platform.machine() == "x86_64"
# The system-call filter denies these: name -> number on (x86_64, aarch64); None where it does not exist.
_DENIED = {
    # network and kernel queues
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434), "tkill": (200, 130),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154),
    "setns": (308, 268), "unshare": (272, 97), "personality": (135, 92), "prctl": (157, 167),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # what Landlock leaves open on files, and memory that no limit counts
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "mknod": (133, None),
    "mknodat": (259, 33), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
    # mounts
    "chroot": (161, 51), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "open_tree": (428, 428),
    "move_mount": (429, 429), "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225), "fanotify_init": (300, 262),
    # the kernel itself
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
}  # fmt: skip
# Allowed only when the first argument is this process (or, for prlimit64, zero).
_OWN = {"kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
_CLONE, _CLONE3, _PRLIMIT, _SOCKETPAIR, _CAPSET = (56, 220), (435, 435), (302, 261), (53, 199), (126, 91)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _PIVOT_ROOT, _MOUNT_SETATTR = 444, 445, 446, (155, 41), 442

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, result):
    """The result of a C call; OSError with its name when it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _number(pair):
    return pair if isinstance(pair, int) else pair[0 if _X86 else 1]


def _syscall(name, number, *arguments):
    return _call(name, _libc.syscall(ctypes.c_long(_number(number)), *arguments))


def _mount(source, target, kind, flags, data=None):
    text = [None if t is None else os.fsencode(t) for t in (source, target, kind, data)]
    _call(f"mount {target}", _libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]))


_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18


def enter_namespaces(settings):
    """A new root with the readable folders (read-only) and a memory file system; no network device is up in it."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWNET
    _call("unshare", _libc.unshare(spaces if uid == 0 else spaces | _NEWUSER))
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as handle:
                handle.write(text)
    root, size = settings["root"], settings["disk_bytes"]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=4096,mode=755")
    read_only = struct.pack("=QQQQ", 1, 0, 0, 0)  # struct mount_attr with MOUNT_ATTR_RDONLY to set
    for path in settings["readable"]:
        target = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "x"):
                pass
        _mount(path, target, None, _MS_BIND | _MS_REC)
        _syscall("mount_setattr", _MOUNT_SETATTR, -100, os.fsencode(target), 0x8000, read_only, len(read_only))
    home = settings["home"]
    os.mkdir(root + home, 0o700)
    # A user id of its own makes the limit on processes count, and leaves no right of root's.
    own = 0x70000000 + os.getpid() if uid == 0 else uid
    os.chown(root + home, own, own if uid == 0 else gid)
    os.chdir(root)
    _syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    _call("umount", _libc.umount2(b".", 2))
    os.chdir(home)
    if uid == 0:
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)


def enter_landlock(settings):
    """Landlock rules: read the readable folders, write the temporary folder, reach no process outside."""
    version = _syscall("landlock", _LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 3:
        raise OSError(errno.ENOSYS, f"Landlock has version {version}; 3 is needed (Linux 6.2)")
    read, write_file = 0b1100, 1 << 1
    files = (1 << (16 if version >= 5 else 15)) - 1
    net, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", files, net, scoped)
    ruleset = _syscall("landlock", _LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)

    def allow(path, rights):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= 0b111 | 1 << 14
        rule = struct.pack("=Qi", rights & files, descriptor)
        _syscall("landlock", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)

    for path in settings["readable"]:
        allow(path, read)
    allow("/dev/null", read | write_file)
    # Everything below the temporary folder but executing, devices and sockets.
    allow(settings["work"], files & ~(1 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15))
    os.chdir(settings["work"])
    no_new_privileges()
    _syscall("landlock", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def no_new_privileges():
    """Nothing this process does can give it rights it has not; needed by Landlock and by the filter."""
    _call("prctl", _libc.prctl(38, 1, 0, 0, 0))


def drop_capabilities():
    """Empty the three capability sets (version 3 of the call, two 32-bit words each)."""
    header, empty = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall("capset", _CAPSET, header, empty)


def limit(settings):
    """Resource limits, soft and hard; the CPU's hard limit kills a second after the soft one signals."""
    for name, soft, hard in (
        ("CPU", settings["cpu_seconds"], settings["cpu_seconds"] + 1),
        ("AS", settings["memory_bytes"], settings["memory_bytes"]),
        ("FSIZE", settings["file_bytes"], settings["file_bytes"]),
        ("NOFILE", settings["open_files"], settings["open_files"]),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    if settings["wall"] == "namespaces":  # where the limit counts this sandbox alone
        resource.setrlimit(resource.RLIMIT_NPROC, (settings["threads"], settings["threads"]))


def install_filter():
    """The system-call filter, for this machine's calls only; it cannot be taken off."""
    load, equal, at_least, mask, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow = 0x80000000, 0x7FFF0000

    def error(code):
        return 0x00050000 | code

    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E if _X86 else 0xC00000B7), (ret, 0, 0, kill), (load, 0, 0, 0)]
    if _X86:
        program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, error(errno.ENOSYS))]
    for pair in _DENIED.values():
        if _number(pair) is not None:
            program += [(equal, 0, 1, _number(pair)), (ret, 0, 0, error(errno.EPERM))]
    # The C library tries clone3 first, whose flags a filter cannot read, and falls back to clone.
    program += [(equal, 0, 1, _number(_CLONE3)), (ret, 0, 0, error(errno.ENOSYS))]
    # A thread may be made, a process not: the answer is that of a process limit.
    program += [(equal, 0, 4, _number(_CLONE)), (load, 0, 0, 16), (mask, 1, 0, 0x10000)]
    program += [(ret, 0, 0, error(errno.EAGAIN)), (ret, 0, 0, allow)]
    # A connected pair of local streams reaches nobody (event loops need one); other kinds could send elsewhere.
    program += [(equal, 0, 7, _number(_SOCKETPAIR)), (load, 0, 0, 16), (equal, 0, 4, 1), (load, 0, 0, 24)]
    program += [(0x54, 0, 0, 0xF), (equal, 0, 1, 1), (ret, 0, 0, allow), (ret, 0, 0, error(errno.EPERM))]
    for pair in _OWN.values():
        program += [(equal, 0, 4, _number(pair)), (load, 0, 0, 16), (equal, 0, 1, os.getpid())]
        program += [(ret, 0, 0, allow), (ret, 0, 0, error(errno.EPERM))]
    program += [(equal, 0, 5, _number(_PRLIMIT)), (load, 0, 0, 16), (equal, 1, 0, 0), (equal, 0, 1, os.getpid())]
    program += [(ret, 0, 0, allow), (ret, 0, 0, error(errno.EPERM))]
    program += [(ret, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    no_new_privileges()
    _call("seccomp", _libc.prctl(22, 2, head, 0, 0))


def prove(settings, parent):
    """Try what must not be possible; RuntimeError naming the first wall that stands open."""
    import _socket

    def fork():
        if os.fork() == 0:
            os._exit(0)

    outside = os.path.join(settings["outside"], "probe")
    flags = os.O_CREAT | os.O_WRONLY
    attempts: dict[str, Callable[[], object]] = {
        "the network": partial(_socket.socket, _socket.AF_INET, _socket.SOCK_STREAM),
        "local sockets": partial(_socket.socket, _socket.AF_UNIX, _socket.SOCK_STREAM),
        "new processes": fork,
        "the parent's environment": partial(os.open, f"/proc/{parent}/environ", os.O_RDONLY),
        "signals to the parent": partial(os.kill, parent, 0),
        "files outside": partial(os.open, outside, flags),
        "folders outside": partial(os.listdir, settings["outside"]),
        "changes to the library": partial(os.open, os.path.join(settings["library"], "probe"), flags),
    }
    for wall, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        raise RuntimeError(f"{wall} could still be reached")
    for name, most in (("AS", settings["memory_bytes"]), ("CPU", settings["cpu_seconds"] + 1)):
        if resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] != most:
            raise RuntimeError(f"the limit RLIMIT_{name} does not hold")


def confine(settings, parent, nothing):
    """Close all walls in order and prove them closed; ``nothing`` is a descriptor this process opened itself."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, nothing, settings["verdict"]) and os.path.exists(f"/proc/self/fd/{name}"):
            raise RuntimeError(f"file descriptor {name} was inherited")
    if settings["wall"] == "namespaces":
        enter_namespaces(settings)
    else:
        enter_landlock(settings)
    drop_capabilities()
    # After the change of user, which clears it: when the parent dies, so does this process.
    _call("prctl", _libc.prctl(1, 9, 0, 0, 0))
    if os.getppid() != parent:
        raise RuntimeError("the parent has gone")
    limit(settings)
    install_filter()
    prove(settings, parent)


# Events by which the code could read the interpreter's memory, where the nonce is, or reach the C library.
_WATCHED = frozenset({"gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames"})
_WATCHED_MODULES = frozenset({"ctypes", "_ctypes", "_ctypes_test", "_testcapi", "_testinternalcapi"})


def watch(event, arguments, *, events=_WATCHED, modules=_WATCHED_MODULES, split=str.rpartition):
    """Audit hook: refuse what lets code look into the process that judges it."""
    if event in events or (event == "import" and split(arguments[0], ".")[2] in modules):
        raise RuntimeError("not allowed in the sandbox")


def steps(work, verdict):
    """The calls to make in order: the solution, the built-ins put back, the tests, and last the nonce to the parent.

    They are C callables that no variable names while they run, so the code under test has no frame in which to find
    the nonce; it is written if and only if the last test has ended without an exception.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    solution = compile(work.pop("code"), "<solution>", "exec", dont_inherit=True)
    tests = compile(work.pop("tests"), "<tests>", "exec", dont_inherit=True)
    return [
        partial(exec, solution, module.__dict__),
        partial(vars(builtins).update, dict(vars(builtins))),
        partial(exec, tests, module.__dict__),
        partial(os.write, verdict, work.pop("nonce").encode()),
    ]


def read_line():
    """The settings, byte by byte, so that nothing of what follows them is taken."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            os._exit(2)
        line += byte
    return json.loads(line)


def read_rest():
    """Everything up to the end of standard input, by the call itself: no buffer keeps a copy."""
    parts = []
    while part := os.read(0, 1 << 16):
        parts.append(part)
    return json.loads(b"".join(parts))


def main():
    """Confine, report, receive, run. The exit status says nothing the parent relies on."""
    parent, leave, show = os.getppid(), os._exit, partial(traceback.print_exception, limit=-8)
    settings = read_line()
    nothing = os.open("/dev/null", os.O_RDONLY)
    try:
        confine(settings, parent, nothing)
    except (OSError, RuntimeError) as error:
        os.write(settings["verdict"], f"refused: {error}\n".encode())
        leave(2)
    os.write(settings["verdict"], b"ready\n")
    work = read_rest()
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv[:] = ["solution"]
    sys.addaudithook(watch)
    for name in ("ctypes", "_libc"):
        del globals()[name]
    for name in _WATCHED_MODULES:
        sys.modules.pop(name, None)
    status = 1
    try:
        deque(map(operator.call, steps(work, settings["verdict"])), maxlen=0)
        status = 0
    except BaseException as error:
        with suppress(Exception):
            sys.stdout.flush()  # what was printed comes before what went wrong
        show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    leave(status)


if __name__ == "__main__":
    main()
