"use strict";
(() => {
  const id = (name) => document.getElementById(name);

  // The table: a button in each head sorts best first, again worst first, a third time in the order asked for.
  const table = id("entries-table");
  const body = table.tBodies[0];
  const asked = [...body.rows];
  const status = id("sorted");
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const column = head.cellIndex;
      const text = button.dataset.kind === "text";
      const first = text || button.dataset.best === "lower" ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort");
      const next = now === null ? first : now === first ? second : null;
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      const rows = [...asked];
      if (next !== null) {
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const key = (row) => row.cells[column].dataset.sort;
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return sign * (text ? x.localeCompare(y, "en", { numeric: true }) : Number(x) - Number(y));
        });
      }
      body.append(...rows);
      const label = button.firstChild.textContent;
      status.textContent = next === null ? "In the order asked for." : `Sorted by ${label}, ${next}.`;
    });
  }

  // Without the script every measure is shown; with it, first the one that speaks for each group.
  const all = id("all-columns");
  if (table.querySelector(".more")) {
    const show = (every) => {
      table.classList.toggle("few", !every);
      all.setAttribute("aria-pressed", String(every));
      for (const group of table.querySelectorAll("[data-few]")) {
        group.colSpan = every ? group.dataset.all : group.dataset.few;
      }
    };
    all.hidden = false;
    all.addEventListener("click", () => show(all.getAttribute("aria-pressed") === "false"));
    show(false);
  }

  for (const button of document.querySelectorAll("[data-toggles]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(shown));
      for (const curve of document.querySelectorAll(`[data-curve="${button.dataset.toggles}"]`)) {
        curve.toggleAttribute("hidden", !shown);
      }
    });
  }

  // Wins and losses: all that comes from data is set as text.
  const data = id("item-data");
  if (data === null) return;
  const { methods, items, names, base, sft } = JSON.parse(data.textContent);
  const PAGE = 10;
  const LONG = 420;
  const make = (tag, kind, ...inside) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...inside);
    return made;
  };
  const said = (text) => {
    if (text.length <= LONG && text.split("\n").length <= 12) return make("div", "said", text || "(nothing)");
    const start = text.slice(0, LONG / 2).split("\n").slice(0, 4).join("\n");
    const end = text.slice(-LONG / 4).split("\n").slice(-2).join("\n");
    const fold = make("details", "", make("summary", "", `All ${text.length.toLocaleString("en")} characters`), make("div", "said", text));
    const short = make("div", "said", `${start} …\n… ${end}`);
    fold.addEventListener("toggle", () => { short.hidden = fold.open; });
    return make("div", "", short, fold);
  };
  const judged = (score) => {
    if (score === null) return make("span", "chip", "not judged");
    if (score === 1) return make("span", "chip better", "✓ right");
    if (score === 0) return make("span", "chip worse", "✗ wrong");
    return make("span", "chip", `score ${score.toFixed(2)}`);
  };
  const answers = (item, entry) => {
    const block = make("div", "answer", make("h4", "", names[entry]));
    const told = item.answers[entry] || [];
    const count = told.reduce((sum, answer) => sum + answer.seeds.length, 0);
    for (const { seeds, score, text } of told) {
      const which = count < 2 ? [] : [`${seeds.length > 1 ? "seeds" : "seed"} ${seeds.join(", ")}`];
      block.append(make("p", "by", ...which, judged(score)), said(text));
    }
    if (count === 0) block.append(make("p", "by", "no answer"));
    return block;
  };
  const card = (place, outcome, method) => {
    const item = items[place];
    const chip = outcome === "won" ? make("span", "chip better", "▲ won") : make("span", "chip worse", "▼ lost");
    const made = make("article", "item", make("h3", "", item.row === null ? "Item" : `Row ${item.row}`, chip));
    made.dataset.outcome = outcome;
    made.append(make("h4", "", "Prompt"), said(item.prompt));
    if (item.reference !== null) made.append(make("h4", "", "Reference"), said(item.reference));
    const entries = [base, sft, method.entry].filter((entry) => entry !== null);
    made.append(make("div", "answers", ...entries.map((entry) => answers(item, entry))));
    return made;
  };
  const list = id("item-list");
  const more = id("item-more");
  let waiting = [];
  const add = () => {
    const method = methods[Number(id("item-method").value)];
    const cards = waiting.splice(0, PAGE).map(([place, outcome]) => card(place, outcome, method));
    list.append(...cards);
    more.hidden = waiting.length === 0;
    more.textContent = `Show ${Math.min(PAGE, waiting.length)} more of ${waiting.length}`;
    return cards;
  };
  const choose = () => {
    const method = methods[Number(id("item-method").value)];
    const wanted = document.querySelector("[name=outcome]:checked").value;
    waiting = method.shown.filter(([, outcome]) => wanted === "both" || outcome === wanted);
    const total = wanted === "both" ? method.won + method.lost : method[wanted];
    const word = wanted === "both" ? "won or lost" : wanted;
    const items = total === 1 ? "item" : "items";
    const capped = waiting.length < total ? `; the first ${waiting.length} are on this page` : "";
    const unjudged = method.unjudged ? `, ${method.unjudged} not judged on both sides` : "";
    id("item-count").textContent = `${total} ${items} ${word}${capped}. The same on both sides: ${method.same}${unjudged}.`;
    list.replaceChildren();
    add();
  };
  id("item-method").addEventListener("change", choose);
  for (const radio of document.querySelectorAll("[name=outcome]")) radio.addEventListener("change", choose);
  more.addEventListener("click", () => {
    const first = add()[0];
    first.tabIndex = -1;
    first.focus();
  });
  id("explorer").hidden = false;
  choose();
})();
