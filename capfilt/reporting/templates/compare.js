/* The page of two runs: the images that both have, with what each run says of their texts. */
const CARDS = 24, VERDICTS = { "-1": "absent", 0: "dropped", 1: "kept", 2: "failed" }, MARKS = { kept: "✓", dropped: "✗", failed: "!" };
const filters = ["verdicts", "presence", "source", "truth", "words"].filter((id) => $(id));
const rows = data.rows;
let shown = CARDS;

/** What side A or B says of a text: "absent" where it does not have it. */
const verdict = (i, side) => VERDICTS[rows[`verdict${side}`][i]];
function inWords(i, side) {
  const given = verdict(i, side);
  return data.sides[side === "A" ? 0 : 1].decided ? given : { kept: "passes", dropped: "below" }[given] || given;
}
const has = (i, side) => verdict(i, side) !== "absent";
function change(i, score) {
  const a = rows[`${score}A`][i], b = rows[`${score}B`][i];
  return a === null || b === null ? null : b - a;
}
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const reason = (i, side) => data.reasons[rows[`why${side}`][i]] || "";

/* ---- the gallery ---- */
function outcome(i) {
  if (!has(i, "A") || !has(i, "B")) return "";
  const a = verdict(i, "A") === "kept", b = verdict(i, "B") === "kept";
  return a && b ? "both" : a ? "a" : b ? "b" : "neither";
}
function passes(i, wanted) {
  const presence = has(i, "A") && has(i, "B") ? "both" : has(i, "A") ? "a" : "b";
  if (wanted.verdicts && (wanted.verdicts === "differ" ? !["a", "b"].includes(outcome(i)) : outcome(i) !== wanted.verdicts)) return false;
  if (wanted.presence && presence !== wanted.presence) return false;
  if (wanted.source && SOURCES[rows.source[i]] !== wanted.source) return false;
  if (wanted.truth && rows.truth[i] !== Number(wanted.truth)) return false;
  return !wanted.words || rows.text[i].toLowerCase().includes(wanted.words.toLowerCase());
}
/** Images with a text that passes the filters, each with all of its texts, in the chosen order. */
function matching() {
  const wanted = Object.fromEntries(filters.map((id) => [id, $(id).value.trim()])), sort = $("sort").value;
  const cards = new Map(), all = new Map();
  rows.image.forEach((image, i) => {
    if (!all.has(image)) all.set(image, []);
    all.get(image).push(i);
    if (!passes(i, wanted)) return;
    const by = sort === "random" ? null : change(i, sort), place = by === null ? 0 : -Math.abs(by), card = cards.get(image);
    if (!card) cards.set(image, { image, place, matched: [i], rows: all.get(image) });
    else { card.place = Math.min(card.place, place); card.matched.push(i); }
  });
  return [...cards.values()].sort((a, b) => a.place - b.place || a.image - b.image);
}
function gallery() {
  const cards = matching(), number = cards.reduce((sum, card) => sum + card.matched.length, 0);
  $("found").textContent = number ? `${count(number)} texts of ${count(cards.length)} images in this page` : "No text in this page is like that.";
  $("save").textContent = `Save ${count(number)} texts as CSV`;
  $("save").disabled = !number;
  $("cards").replaceChildren(...cards.slice(0, shown).map(drawn));
  $("more").hidden = cards.length <= shown;
}
function drawn({ image, rows: all }) {
  const lines = (folded) => {
    const list = (kind, wanted) => all.some(wanted) ? element("ul", kind, ...all.filter(wanted).map((i) => line(i, folded))) : "";
    const own = [list("", (i) => has(i, "A") && !has(i, "B")), list("", (i) => !has(i, "A") && has(i, "B"))];
    return element("div", "sides", list("", (i) => has(i, "A") && has(i, "B")), element("div", "pair", ...own));
  };
  return element("article", "card", thumbnail(image, rows.text[all[0]], () => [lines(false)]), lines(true));
}
function line(i, folded) {
  const source = SOURCES[rows.source[i]], sides = ["A", "B"].filter((side) => has(i, side));
  const only = sides.length === 1 ? element("b", "", `${sides[0]} only`) : "", truth = rows.truth[i];
  const kind = sides.every((side) => verdict(i, side) === "kept") ? "kept" : sides.some((side) => verdict(i, side) === "kept") ? "mixed" : "dropped";
  return element("li", `text ${kind}`,
    element("div", "meta", only, element("span", "", "T", element("sub", "", source[0]), ` ${source}`), truth >= 0 ? element("span", "", truth ? "truly right" : "truly wrong") : ""),
    ...said(rows.text[i], rows.length[i] - rows.text[i].length, folded),
    ...sides.map((side) => sideLine(i, side)), changes(i));
}
function sideLine(i, side) {
  const figures = ["itm", "itc"].map((score) => element("span", "", `${score} ${decimals(rows[`${score}${side}`][i])}`));
  const why = reason(i, side);
  return element("div", "meta", element("b", "", `${side} ${MARKS[verdict(i, side)]} ${inWords(i, side)}`), ...figures, why ? element("span", "", why) : "");
}
function changes(i) {
  const parts = ["itm", "itc"].map((score) => [score, change(i, score)]).filter(([, value]) => value !== null);
  return parts.length ? element("div", "meta", element("span", "", "B − A: "), ...parts.map(([score, value]) => element("b", "", `${score} ${signed(value)}`))) : "";
}
function saveTexts() {
  const headings = ["shard", "key", "uid", "source", "text", "characters", "truth", ...["A", "B"].flatMap((side) => ["itm", "itc", "verdict", "reason"].map((name) => `${name}_${side}`))];
  const bySide = (i, side) => [rows[`itm${side}`][i], rows[`itc${side}`][i], inWords(i, side), reason(i, side)];
  const lines = matching().flatMap((card) => card.matched).map((i) => {
    const image = rows.image[i], [shard, uid] = data.identities[image], truth = rows.truth[i];
    return [shard, data.images[image][0], uid, SOURCES[rows.source[i]], rows.text[i], rows.length[i], truth < 0 ? null : truth ? "right" : "wrong", ...bySide(i, "A"), ...bySide(i, "B")];
  });
  saveCsv("texts", headings, lines);
}
function start() {
  const draw = atNextFrame(gallery);
  const refresh = () => { shown = CARDS; draw(); };
  [...filters, "sort"].forEach((id) => $(id).addEventListener("input", refresh));
  $("save").onclick = saveTexts;
  $("more").onclick = () => { shown += CARDS; gallery(); };
  gallery();
}
if (data.images.length) start();
