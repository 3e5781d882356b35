/* The page of one run: decides every text anew from its scores, and shows what came of it. */
const MARKS = { kept: "✓", dropped: "✗", failed: "!" }, CARDS = 24;
const filters = ["verdict", "versus", "source", "reason", "truth", "labelled", "words"].filter((id) => $(id));
const state = { round: data.looks.length - 1, shown: CARDS, score: "itm", threshold: 0 };
const round = () => data.looks[state.round], texts = () => round().texts;
/** A verdict in words: before a policy ran nothing is kept or dropped. */
const inWords = (verdict) => round().decided ? verdict : { kept: "passes", dropped: "below", failed: "failed" }[verdict];

/* ---- deciding ---- */
const scoreNames = () => [...new Set(["itm", "itc", ...Object.keys(round().ranges)])];
const scoreOf = (i, rule = state) => texts()[rule.score][i];
function why(i, rule = state) {
  const fixed = texts().fixed[i];
  if (fixed >= 0) return data.reasons[fixed][1];
  if (fixed === -2) return ""; // kept by the policy's other threshold
  if (scoreOf(i, rule) === null) return `no ${rule.score} score`;
  // Scores are 32-bit in the annotations; fround gives back the very number that the policy compares.
  return Math.fround(scoreOf(i, rule)) >= rule.threshold ? "" : `${rule.score} below threshold`;
}
function verdict(i, rule = state) {
  const fixed = texts().fixed[i];
  if (fixed >= 0 && data.reasons[fixed][2]) return "failed";
  return why(i, rule) ? "dropped" : "kept";
}
function wilson(hits, total) {
  if (!total) return [0, 1];
  const z = 1.959964, share = hits / total, scale = 1 + z * z / total;
  const middle = share + z * z / (2 * total);
  const spread = z * Math.sqrt(share * (1 - share) / total + z * z / (4 * total * total));
  return [Math.max(0, (middle - spread) / scale), Math.min(1, (middle + spread) / scale)];
}

/* ---- what passes a rule ---- */
const counts = () => ({ total: 0, right: 0, kept: 0, both: 0 });
function note(into, known, kept) {
  if (known < 0) return;
  into.total += 1; into.right += known; into.kept += kept; into.both += kept && known;
}
function tally(rule = state) {
  const sums = { in: SOURCES.map(() => 0), kept: SOURCES.map(() => 0), truth: counts(), labels: counts(), labelled: 0 };
  texts().image.forEach((_, i) => {
    const given = verdict(i, rule), kept = given === "kept", source = texts().source[i], scored = scoreOf(i, rule) !== null;
    if (given === "failed") return;
    sums.in[source] += 1;
    sums.kept[source] += kept;
    // As in summary.json: the first web text of an image, where it has a score.
    note(sums.truth, source === 0 && texts().candidate[i] === 0 && scored ? texts().truth[i] : -1, kept);
    const label = texts().label[i];
    sums.labelled += label >= 0;
    note(sums.labels, label === 0 || label === 1 ? label : -1, kept && scored);
  });
  return sums;
}
/** A number of the page's texts of a source as one of all its texts: exact where the page has all of them. */
function ofAll(number, source, inPage) {
  const total = round().totals[SOURCES[source]] || 0;
  return inPage === total ? count(number) : `about ${count(Math.round(number / inPage * total))}`;
}
function live() {
  const sums = tally(), parts = [], passed = round().decided ? "kept" : "pass";
  SOURCES.forEach((source, s) => {
    const total = round().totals[source] || 0;
    if (!total || !sums.in[s]) return;
    const sampled = sums.in[s] === total ? "" : ` (from ${count(sums.in[s])} drawn at random)`;
    const share = percent(sums.kept[s] / sums.in[s]);
    parts.push([`${source}: `, `${ofAll(sums.kept[s], s, sums.in[s])} of ${count(total)}`, ` ${passed}, ${share}${sampled}`]);
  });
  if (sums.truth.total) parts.push([`${count(sums.truth.total)} web texts of known truth: `, quality(sums.truth), ""]);
  if (sums.labels.total) parts.push([`${count(sums.labels.total)} random labels: `, quality(sums.labels, true), " (95 % intervals)"]);
  if (sums.labelled > sums.labels.total) parts.push(["", count(sums.labelled - sums.labels.total), " labels given otherwise, not counted"]);
  $("live").replaceChildren(...parts.map(([before, figure, after]) => element("span", "", before, element("b", "", figure), after)));
}
function quality(sums, interval = false) {
  const figure = (name, hits, total) => {
    if (!total) return `${name} –`;
    const [low, high] = wilson(hits, total);
    return `${name} ${(hits / total).toFixed(3)}${interval ? ` [${low.toFixed(2)}, ${high.toFixed(2)}]` : ""}`;
  };
  return `${figure("precision", sums.both, sums.kept)}, ${figure("recall", sums.both, sums.right)}`;
}
function histograms() {
  document.querySelectorAll(".chart[data-look]").forEach((chart) => {
    chart.hidden = Number(chart.dataset.look) !== state.round || chart.dataset.score !== state.score;
    const svg = chart.querySelector("svg[data-low]");
    mark(svg, svg.querySelector(".cut"), state.threshold);
    svg.querySelector(".cut-b").toggleAttribute("hidden", versus.score !== state.score);
    mark(svg, svg.querySelector(".cut-b"), versus.threshold);
  });
}
function mark(svg, line, threshold) {
  const { low, high, left, right } = Object.fromEntries(Object.entries(svg.dataset).map(([k, v]) => [k, Number(v)]));
  const x = left + (right - left) * Math.min(1, Math.max(0, (threshold - low) / (high - low)));
  line.setAttribute("x1", x); line.setAttribute("x2", x);
}
function command() {
  const t = state.threshold;
  return `${round().select} --out ${round().out}-${state.score}-${t.toFixed(3)} --score ${state.score} --threshold ${t}`;
}

/* ---- the gallery ---- */
function passes(i, wanted) {
  const given = verdict(i), truth = texts().truth[i];
  if (wanted.verdict && given !== wanted.verdict) return false;
  if (wanted.versus && !differs(i, wanted.versus)) return false;
  if (wanted.source && SOURCES[texts().source[i]] !== wanted.source) return false;
  if (wanted.reason && why(i) !== wanted.reason) return false;
  if (wanted.truth === "err" ? truth < 0 || (truth === 1) === (given === "kept") : wanted.truth && truth !== (wanted.truth === "right" ? 1 : 0)) return false;
  if (wanted.labelled && (texts().label[i] >= 0) !== (wanted.labelled === "yes")) return false;
  return !wanted.words || texts().text[i].toLowerCase().includes(wanted.words.toLowerCase());
}
function order(i, sort) {
  if (sort === "random") return texts().image[i];
  if (scoreOf(i) === null) return Infinity;
  return sort === "close" ? Math.abs(scoreOf(i) - state.threshold) : sort === "low" ? scoreOf(i) : -scoreOf(i);
}
/** Images with at least one text for which `wanted` holds, each with all of its texts, the nearest first. */
function imagesWith(wanted, sort) {
  const cards = new Map(), all = new Map();
  texts().image.forEach((image, i) => {
    if (!all.has(image)) all.set(image, []);
    all.get(image).push(i);
    if (!wanted(i)) return;
    const place = order(i, sort), card = cards.get(image);
    if (!card) cards.set(image, { image, place, matched: [i], rows: all.get(image) });
    else { card.place = Math.min(card.place, place); card.matched.push(i); }
  });
  return [...cards.values()].sort((a, b) => a.place - b.place || a.image - b.image);
}
function matching() {
  const wanted = Object.fromEntries(filters.map((id) => [id, $(id).value.trim()]));
  return imagesWith((i) => passes(i, wanted), $("sort").value);
}
function gallery() {
  const cards = matching(), number = cards.reduce((sum, card) => sum + card.matched.length, 0);
  $("found").textContent = cards.length ? `${count(number)} texts of ${count(cards.length)} images in this page` : "No text in this page is like that.";
  $("save").textContent = `Save ${count(number)} texts as CSV`;
  $("save").disabled = !number;
  $("cards").replaceChildren(...cards.slice(0, state.shown).map(drawn));
  $("more").hidden = cards.length <= state.shown;
}
function drawn({ image, rows }) {
  const words = texts().text[rows[0]];
  const lines = () => [element("ul", "", ...rows.map((i) => line(i, false)))];
  return element("article", "card", thumbnail(image, words, lines), element("ul", "", ...rows.map((i) => line(i))));
}
function line(i, inGallery = true) {
  const given = verdict(i), truth = texts().truth[i], kind = texts().kind[i], text = texts().text[i];
  const figure = (name) => element(name === state.score ? "b" : "span", "", `${name} ${decimals(texts()[name][i])}`);
  const fixed = texts().fixed[i], reason = fixed >= 0 ? data.reasons[fixed][0] : why(i);
  // Who gives a label must not be led: in random order, a verdict is shown once the person has given theirs.
  const blind = data.review && given !== "failed" && texts().label[i] < 0 && $("sort").value === "random";
  const source = SOURCES[texts().source[i]];
  const parts = said(text, round().cut[i] ? round().cut[i] - text.length : 0, inGallery);
  const row = element("li", blind ? "text" : `text ${given}`,
    element("div", "meta", blind ? "" : element("b", "mark-word", `${MARKS[given]} ${inWords(given)}`), element("span", "", "T", element("sub", "", source[0]), ` ${source}`)),
    ...parts,
    blind ? "" : element("div", "meta", ...scoreNames().map(figure), reason ? element("span", "", reason) : "", truth >= 0 ? element("span", "", truth ? "truly right" : `truly wrong${kind >= 0 ? `: ${data.kinds[kind]}` : ""}`) : "", labelled(i), heatmap(i)));
  if (!inGallery) return row;
  parts[0].firstChild.id = `said-${i}`;
  row.dataset.row = i;
  if (data.review && given !== "failed") row.append(labelButtons(i));
  return row;
}
/** A button that puts the picture beside a text under the text's heatmap, and back, where the page has one. */
function heatmap(i) {
  const drawn = round().heat[i], plain = data.images[texts().image[i]][1];
  if (!drawn) return "";
  const toggle = button("heatmap", () => {
    const home = toggle.closest(".card, dialog"), on = toggle.getAttribute("aria-pressed") === "false";
    for (const each of home.querySelectorAll(".heat")) each.setAttribute("aria-pressed", String(on && each === toggle));
    home.querySelector("img").src = on ? drawn : plain;
  }, "link heat");
  toggle.setAttribute("aria-pressed", "false");
  return toggle;
}
function labelled(i) {
  const label = texts().label[i];
  return label < 0 || data.review ? "" : element("span", "", `labelled ${label % 2 ? "right" : "wrong"}`);
}
function saveTexts() {
  const headings = ["shard", "key", "uid", "source", "candidate", "text", "characters", ...scoreNames(), round().decided ? "verdict" : "at_threshold", "reason", "truth", "kind", "label"];
  const known = (code) => code < 0 ? null : code % 2 ? "right" : "wrong";
  const rows = matching().flatMap((card) => card.matched).map((i) => {
    const t = texts(), [shard, uid] = data.identities[t.image[i]] || ["", ""], fixed = t.fixed[i];
    return [
      shard, data.images[t.image[i]][0], uid, SOURCES[t.source[i]], t.candidate[i], t.text[i], round().cut[i] || t.text[i].length, ...scoreNames().map((name) => t[name][i]),
      inWords(verdict(i)), fixed >= 0 ? data.reasons[fixed][0] : why(i), known(t.truth[i]), data.kinds[t.kind[i]], known(t.label[i]),
    ];
  });
  saveCsv("texts", headings, rows);
}

/* ---- controls ---- */
const draw = atNextFrame(() => {
  live(); compareThresholds(); histograms(); reasons(); gallery();
  $("command").textContent = command();
});
function refresh() {
  state.shown = CARDS;
  draw();
}
function reasons() {
  const present = new Set(texts().image.map((_, i) => why(i)).filter(Boolean)), chosen = $("reason").value;
  const options = ["", ...[...present].sort()].map((reason) => new Option(reason || "any", reason, false, reason === chosen));
  $("reason").replaceChildren(...options);
}
function setThreshold(threshold, from) {
  if (!Number.isFinite(threshold)) return;
  state.threshold = threshold;
  if (from !== "slider") $("slider").value = threshold;
  if (from !== "threshold") $("threshold").value = Number(threshold.toFixed(6));
  $("slider").setAttribute("aria-valuetext", threshold.toFixed(3));
  refresh();
}
const rangeOf = (score) => round().ranges[score] || [0, 1];
function useScore(name) {
  const [min, max] = rangeOf(name);
  Object.assign($("slider"), { min, max, step: 0.001 });
  $("score").value = state.score = name;
}
/** The threshold that this many texts reach, in thousandths. */
function thresholdFor(name, number) {
  const sorted = texts()[name].filter((value, i) => value !== null && texts().fixed[i] < 0).sort((a, b) => b - a);
  return Math.floor(1000 * (sorted[Math.max(0, Math.round(number) - 1)] ?? 0.5)) / 1000;
}
/** Another score: from the threshold that keeps as many texts as the one before. */
function changeScore(name) {
  const kept = texts().image.filter((_, i) => verdict(i) === "kept").length;
  const threshold = name === round().score ? round().threshold : thresholdFor(name, kept);
  useScore(name);
  setThreshold(threshold);
}
function openRound(index) {
  state.round = index;
  $("look").value = index;
  for (const option of [...$("score").options, ...$("b-score").options]) option.hidden = option.disabled = !round().ranges[option.value];
  for (const option of $("verdict").options) option.textContent = option.value ? inWords(option.value) : "any";
  useScore(round().score);
  openVersus();
  setThreshold(round().threshold);
}
function copy() {
  const done = (words) => { $("copied").textContent = words; };
  const select = () => { getSelection().selectAllChildren($("command")); done("Selected: press Ctrl+C."); };
  if (!navigator.clipboard) return select();
  navigator.clipboard.writeText(command()).then(() => done("Copied."), select);
}
function start() {
  $("slider").oninput = (event) => setThreshold(Number(event.target.value), "slider");
  $("threshold").oninput = (event) => event.target.value.trim() && setThreshold(Number(event.target.value), "threshold");
  $("look").onchange = (event) => openRound(Number(event.target.value));
  $("score").onchange = (event) => changeScore(event.target.value);
  $("reset").onclick = () => openRound(state.round);
  $("copy").onclick = copy;
  $("save").onclick = saveTexts;
  $("more").onclick = () => { state.shown += CARDS; gallery(); };
  [...filters, "sort"].forEach((id) => $(id).addEventListener("input", refresh));
  document.addEventListener("keydown", labelByKey);
  if (!data.looks.some((each) => each.texts.truth.some((truth) => truth >= 0))) $("truth").closest(".field").hidden = true;
  if (data.looks.length === 1) $("look").closest(".field").hidden = true;
  if (data.review) {
    $("sort").value = "random";
    $("thresholds").hidden = true; // its examples would lead whoever gives labels
  }
  startVersus();
  openRound(state.round);
}
if (data.looks.length) start();
