/* Labels, under `capfilt review`: every click is posted to the server that the page came from. */
function labelButtons(i) {
  const choice = (word, value) => {
    const made = button(word, () => give(i, made.getAttribute("aria-pressed") === "true" ? "none" : word));
    made.setAttribute("aria-describedby", `said-${i}`);
    made.setAttribute("aria-pressed", texts().label[i] >= 0 && texts().label[i] % 2 === value);
    return made;
  };
  return element("div", "asked", choice("right", 1), choice("wrong", 0));
}
async function give(i, word) {
  const at = state.round, random = $("sort").value === "random" && filters.every((id) => !$(id).value.trim());
  try {
    const answer = await fetch(`/labels${location.search}`, {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ look: at, row: i, verdict: word, at_random: random }),
    });
    if (!answer.ok) throw new Error(await answer.text());
    const { labels } = await answer.json();
    labels.forEach(([number, row, value]) => { data.looks[number].texts.label[row] = value; });
    $("saved").textContent = `Saved: ${word === "none" ? "label taken back" : word}.`;
  } catch (error) {
    $("saved").textContent = `Not saved: ${error.message}. Is capfilt review still running?`;
    return false;
  }
  const old = document.querySelector(`[data-row="${i}"]`);
  if (old && at === state.round) {
    const focused = old.contains(document.activeElement) ? [...old.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    const made = line(i);
    made.classList.toggle("current", old.classList.contains("current"));
    old.replaceWith(made);
    if (focused >= 0) made.querySelectorAll("button")[focused].focus();
  }
  live();
  return true;
}
function moveCurrent(by) {
  const rows = [...document.querySelectorAll("#cards .text")];
  const next = rows[Math.min(rows.length - 1, Math.max(0, rows.findIndex((row) => row.classList.contains("current")) + by))];
  rows.forEach((row) => row.classList.toggle("current", row === next));
  if (next) next.scrollIntoView({ block: "center" });
}
function labelByKey(event) {
  if (!data.review || $("viewer").open || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const row = document.querySelector("#cards .text.current"), word = { r: "right", w: "wrong", u: "none" }[event.key];
  if (event.key === "j" || event.key === "k") moveCurrent(event.key === "j" ? 1 : -1);
  else if (word && row && row.querySelector(".asked")) give(Number(row.dataset.row), word).then((saved) => saved && word !== "none" && moveCurrent(1));
}
