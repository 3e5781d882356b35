/* Two thresholds side by side: A is the page's, B its neighbour. Only what differs between them is worth an example. */
const versus = { score: "itm", threshold: 0 }, EXAMPLES = 4;

/** Whether a text passes only A ("a"), only B ("b"), or one of them ("ab"). */
function differs(i, which) {
  const a = verdict(i) === "kept", b = verdict(i, versus) === "kept";
  return a !== b && (which === "ab" || (which === "a") === a);
}

function compareThresholds() {
  if (data.review) return;
  const a = tally(), b = tally(versus), only = { a: SOURCES.map(() => 0), b: SOURCES.map(() => 0) };
  texts().image.forEach((_, i) => {
    for (const which of ["a", "b"]) only[which][texts().source[i]] += differs(i, which);
  });
  const rows = SOURCES.map((source, s) => {
    const figures = [a.kept[s], b.kept[s], a.kept[s] - only.a[s], only.a[s], only.b[s]];
    return [source, a.in[s], figures.map((number) => `${ofAll(number, s, a.in[s])} (${percent(number / a.in[s])})`)];
  }).filter(([, number]) => number);
  const cells = rows.map(([source, number, figures]) => element("tr", "", heading(source), ...[ofAll(number, SOURCES.indexOf(source), number), ...figures].map((text) => element("td", "", text))));
  if (a.truth.total) {
    const wide = (text, columns) => Object.assign(element("td", "", text), { colSpan: columns });
    cells.push(element("tr", "", heading("known truth"), wide(`A: ${quality(a.truth)}; B: ${quality(b.truth)}`, 6)));
  }
  $("versus-rows").replaceChildren(...cells);
  $("rule-a").textContent = `A: ${state.score} ≥ ${state.threshold.toFixed(3)}`;
  const numbers = { a: only.a.reduce((sum, number) => sum + number), b: only.b.reduce((sum, number) => sum + number) };
  for (const which of ["a", "b"]) examples(which, numbers[which]);
  $("versus-same").hidden = numbers.a + numbers.b > 0;
}
function heading(text) {
  return Object.assign(element("th", "", text), { scope: "row" });
}
function examples(which, number) {
  const cards = number ? imagesWith((i) => differs(i, which), "random").slice(0, EXAMPLES) : [];
  const show = () => {
    $("versus").value = which;
    refresh();
    $("gallery").scrollIntoView();
  };
  $(`only-${which}`).hidden = !number;
  $(`only-${which}`).replaceChildren(
    element("h3", "", `Only ${which.toUpperCase()} passes ${count(number)} texts of this page`),
    element("div", "examples", ...cards.map((card) => differing(card, which))),
    number > cards.length ? button("Show them in the gallery", show) : "");
}
/** A card with the texts that differ alone. */
function differing({ image, matched }, which) {
  const passes = which === "a" ? "✓ A, ✗ B" : "✗ A, ✓ B", words = texts().text[matched[0]];
  const lines = (folded) => element("ul", "", ...matched.map((i) => element("li", "text",
    element("div", "meta", element("b", "", passes), element("span", "", SOURCES[texts().source[i]])),
    ...said(texts().text[i], 0, folded),
    element("div", "meta", ...scoreNames().map((name) => element("span", "", `${name} ${decimals(texts()[name][i])}`))))));
  return element("article", "card", thumbnail(image, words, () => [lines(false)]), lines(true));
}

function setVersus(threshold, from) {
  if (!Number.isFinite(threshold)) return;
  versus.threshold = threshold;
  if (from !== "slider") $("b-slider").value = threshold;
  if (from !== "threshold") $("b-threshold").value = Number(threshold.toFixed(6));
  $("b-slider").setAttribute("aria-valuetext", threshold.toFixed(3));
  refresh();
}
function useVersusScore(name) {
  const [min, max] = rangeOf(name);
  Object.assign($("b-slider"), { min, max, step: 0.001 });
  $("b-score").value = versus.score = name;
}
/** B begins where half of the texts pass. */
function half(name) {
  return thresholdFor(name, texts()[name].filter((value) => value !== null).length / 2);
}
function openVersus() {
  useVersusScore(round().score);
  setVersus(half(round().score));
}
function swap() {
  const { score, threshold } = state;
  useScore(versus.score);
  state.threshold = versus.threshold;
  useVersusScore(score);
  setVersus(threshold);
  setThreshold(state.threshold);
}
function startVersus() {
  $("b-slider").oninput = (event) => setVersus(Number(event.target.value), "slider");
  $("b-threshold").oninput = (event) => event.target.value.trim() && setVersus(Number(event.target.value), "threshold");
  $("b-score").onchange = (event) => {
    useVersusScore(event.target.value);
    setVersus(half(event.target.value));
  };
  $("swap").onclick = swap;
}
