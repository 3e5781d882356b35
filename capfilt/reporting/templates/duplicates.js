/* The page of a deduplication: pairs of a picture that goes and the one that stands for it, by how far they are apart. */
const CARDS = 24;
let shown = CARDS;
const kindNow = () => data.kinds[Number($("kind").value)];
const unit = (name, distance) => name === "phash" ? `${distance} bits` : `a cosine of ${(1 - distance).toFixed(3)}`;

function matching() {
  const kind = Number($("kind").value), most = Number($("distance").value) + 1e-9;
  return data.pairs.filter((pair) => pair[2] === kind && pair[3] <= most).sort((a, b) => b[3] - a[3]);
}
function gallery() {
  const [name, counts] = kindNow(), most = Number($("distance").value), pairs = matching();
  const sum = (wanted) => counts.filter(wanted).reduce((total, [, number]) => total + number, 0);
  $("found").textContent = `Within ${unit(name, most)}: ${count(sum(([distance]) => distance <= most + 1e-9))} of the ${count(sum(() => true))} pictures that go by ${name}; ${count(pairs.length)} of these pairs are in this page`;
  $("cards").replaceChildren(...pairs.slice(0, shown).map(drawn));
  $("more").hidden = pairs.length <= shown;
}
function drawn([gone, stays, kind, distance]) {
  const said = unit(data.kinds[kind][0], distance), half = (image, words) => thumbnail(image, words, () => [element("p", "", said)]);
  return element("article", "card", half(gone, "goes"), element("div", "", half(stays, "stays"), element("div", "meta", element("b", "", said))));
}
/** The slider of a kind: from 0 to the largest distance that there is. */
function setSlider() {
  const [name, counts] = kindNow(), slider = $("distance");
  slider.min = 0;
  slider.step = name === "phash" ? 1 : 0.001;
  slider.max = Math.max(...counts.map(([distance]) => distance), name === "phash" ? 1 : 0.001);
  slider.value = slider.max;
}
if ($("kind")) {
  const draw = atNextFrame(gallery), refresh = () => { shown = CARDS; draw(); };
  $("kind").addEventListener("input", () => { setSlider(); refresh(); });
  $("distance").addEventListener("input", refresh);
  $("more").onclick = () => { shown += CARDS; gallery(); };
  setSlider();
  gallery();
}
