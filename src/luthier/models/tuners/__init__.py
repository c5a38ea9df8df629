"""The layers of our own adapter types, one file each; see :mod:`luthier.models.peft_types`."""
