"use strict";
// The dialogue view shows one dialogue at a time. Data enters the page only as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const find = (id) => document.getElementById(id);
  const [choice, turns, position, onlyErrors] =
    ["choice", "turns", "position", "only-errors"].map(find);
  const numClasses = data.classes.length;
  const isWrong = (row) => data.label[row] >= 0 && data.label[row] !== data.predicted[row];

  // A dialogue has the rows from `start` to `end` - 1; `errors` counts its wrong predictions.
  const dialogues = data.dialogues.map((id, index) => {
    const [start, end] = [data.offsets[index], data.offsets[index + 1]];
    let errors = 0;
    for (let row = start; row < end; row++) errors += isWrong(row);
    return { id, start, end, errors };
  });
  let shown = dialogues; // dialogues that pass the filter
  let current = 0; // index into `shown`

  function make(name, className, text, attributes = {}) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  function verdict(row) {
    const [label, predicted] = [data.label[row], data.predicted[row]];
    const box = make("div", "verdict");
    if (label < 0) {
      box.append(make("strong", "", data.classes[predicted]), make("span", "aside", "no label"));
    } else if (label === predicted) {
      box.append(make("span", "sign", "✓ ", { "aria-hidden": "true" }));
      box.append(make("strong", "", data.classes[label]));
      box.append(make("span", "aside", "correct"));
    } else {
      box.append(make("span", "sign", "✗ ", { "aria-hidden": "true" }));
      box.append(make("strong", "", data.classes[predicted]));
      box.append(make("span", "aside", `true: ${data.classes[label]}`));
    }
    return box;
  }

  function experts(row) {
    const box = make("div", "experts");
    if (data.gate) {
      const weights = data.gate.map((column) => column[row]);
      const labels = data.experts.map((name, e) => `${name} ${Math.round(weights[e] / 10)}%`);
      const bar = make("div", "stack", undefined, {
        role: "img",
        "aria-label": `gate: ${labels.join(", ")}`,
      });
      weights.forEach((weight, e) => {
        const text = weight >= 120 ? String(Math.round(weight / 10)) : "";
        const part = make("span", `part ${data.experts[e]}`, text);
        part.style.width = `${weight / 10}%`;
        bar.append(part);
      });
      box.append(bar);
    }
    const votes = make("ul", "votes");
    data.experts.forEach((name, e) => {
      const vote = data.votes[e][row];
      const item = make("li", name);
      item.append(make("span", "swatch", "", { "aria-hidden": "true" }));
      item.append(make("span", "hidden", `${name}: `));
      const correct = vote >= 0 && vote === data.label[row];
      item.append(make("span", correct ? "vote correct" : "vote", vote < 0 ? "–" : data.classes[vote]));
      if (vote < 0) item.title = `${name}: no vote because its modality is missing`;
      else item.title = `${name} votes ${data.classes[vote]}${correct ? ", which is correct" : ""}`;
      votes.append(item);
    });
    box.append(votes);
    return box;
  }

  function probabilities(row, id) {
    const box = make("div", "probabilities", undefined, { id });
    const table = make("table");
    table.append(make("caption", "", "probabilities"));
    const order = data.classes.map((_, c) => c);
    const probability = (c) => data.probabilities[row * numClasses + c];
    order.sort((a, b) => probability(b) - probability(a));
    for (const c of order) {
      const line = make("tr");
      const name = make("th", "", data.classes[c], { scope: "row" });
      if (c === data.label[row]) name.append(make("span", "aside", " true"));
      const bar = make("td", "bar");
      const fill = make("span");
      fill.style.width = `${probability(c) / 10}%`;
      bar.append(fill);
      line.append(name, bar, make("td", "number", (probability(c) / 1000).toFixed(3)));
      table.append(line);
    }
    box.append(table);
    return box;
  }

  function turn(row, number) {
    const item = make("li", isWrong(row) ? "turn wrong" : "turn", undefined, {
      tabindex: number === 1 ? "0" : "-1",
      "aria-describedby": `probabilities-${number}`,
    });
    const words = make("div", "words");
    const text = data.texts ? data.texts[row] : null;
    if (text) words.append(make("p", "transcript", text));
    words.append(make("p", text ? "id" : "id alone", data.utterances[row]));
    item.append(make("span", "number", String(number), { "aria-hidden": "true" }));
    item.append(words, verdict(row));
    if (data.experts.length) item.append(experts(row));
    item.append(probabilities(row, `probabilities-${number}`));
    return item;
  }

  function show(index) {
    current = index;
    const dialogue = shown[current];
    turns.replaceChildren();
    for (let row = dialogue.start; row < dialogue.end; row++) {
      turns.append(turn(row, row - dialogue.start + 1));
    }
    turns.classList.remove("quiet");
    choice.selectedIndex = current;
    const count = plural(dialogue.end - dialogue.start, "utterance");
    position.textContent =
      `Dialogue ${current + 1} of ${shown.length}: ${count}, ${dialogue.errors || "none"} wrong`;
    find("previous").setAttribute("aria-disabled", current === 0);
    find("next").setAttribute("aria-disabled", current === shown.length - 1);
  }

  function go(index) {
    show(index);
    // Browsers may forbid a local file to change its address.
    try {
      history.replaceState(null, "", `#dialogue=${encodeURIComponent(shown[current].id)}`);
    } catch { /* keep the address */ }
  }

  function applyFilter(wanted) {
    shown = onlyErrors.checked ? dialogues.filter((dialogue) => dialogue.errors) : dialogues;
    const options = document.createDocumentFragment();
    for (const { id, start, end, errors } of shown) {
      const suffix = errors ? `, ${errors} wrong` : "";
      options.append(make("option", "", `${id} – ${plural(end - start, "utterance")}${suffix}`));
    }
    choice.replaceChildren(options);
    // Stay at the current dialogue, or go to the next one that passes the filter.
    const next = shown.findIndex(({ start }) => start >= wanted.start);
    show(next < 0 ? shown.length - 1 : next);
  }

  function step(by) {
    const index = current + by;
    if (index < 0 || index >= shown.length) return;
    const focused = turns.contains(document.activeElement);
    go(index);
    if (focused) turns.firstElementChild.focus();
  }

  function focusTurn(item) {
    for (const other of turns.children) other.tabIndex = other === item ? 0 : -1;
    item.focus();
  }

  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  choice.addEventListener("change", () => go(choice.selectedIndex));
  onlyErrors.addEventListener("change", () => applyFilter(shown[current]));
  for (const event of ["pointerover", "focusin"]) {
    turns.addEventListener(event, () => turns.classList.remove("quiet"));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    const target = event.target;
    if (event.key === "Escape") turns.classList.add("quiet");
    const inView = find("dialogues").contains(target) && target !== choice;
    if (!inView && target !== document.body) return;
    const item = target.closest("#turns > li");
    const moves = { ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
    if (item) {
      moves.ArrowUp = () => focusTurn(item.previousElementSibling ?? item);
      moves.ArrowDown = () => focusTurn(item.nextElementSibling ?? item);
    }
    if (!(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
  });

  const anyErrors = dialogues.filter((dialogue) => dialogue.errors).length;
  onlyErrors.disabled = !anyErrors;
  find("only-errors-label").textContent = `only the ${anyErrors} with errors`;
  document.querySelector(".controls").hidden = false;
  find("keys").hidden = false;
  const requested = new URLSearchParams(location.hash.slice(1)).get("dialogue");
  applyFilter(dialogues.find(({ id }) => id === requested) ?? dialogues[0]);
  if (requested !== null) find("dialogues").scrollIntoView({ behavior: "instant" });
})();
