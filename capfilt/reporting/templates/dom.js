"use strict";
/* What the scripts of both pages share. They only ever write text content, never markup, and talk to nobody but, under
   `capfilt review`, to where the page came from. */
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SOURCES = ["web", "synthetic", "human"];
const FOLDED = 180; // characters from which a text is folded
const count = (number) => number.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const decimals = (value, digits = 3) => value === null ? "–" : value.toFixed(digits);

function element(name, kind, ...inside) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...inside);
  return made;
}

function button(label, onclick, kind = "") {
  const made = element("button", kind, label);
  made.type = "button";
  made.onclick = onclick;
  return made;
}

/** A text of the web, in its own direction; a long one is folded, with a button that unfolds it. `rest` is the number
    of characters that the page does not have. */
function said(text, rest = 0, folded = true) {
  const words = element("bdi", "", text);
  words.dir = "auto";
  const paragraph = element("p", "said", words, rest ? ` … (${count(rest)} more characters are not in this page)` : "");
  if (!folded || (text.length <= FOLDED && text.split("\n").length <= 4)) return [paragraph];
  paragraph.classList.add("folded");
  const unfold = button(`show all ${count(text.length + rest)} characters`, () => {
    const open = !paragraph.classList.toggle("folded");
    unfold.setAttribute("aria-expanded", String(open));
    unfold.textContent = open ? "show less" : `show all ${count(text.length + rest)} characters`;
  }, "link");
  unfold.setAttribute("aria-expanded", "false");
  return [paragraph, unfold];
}

function picture(image, words) {
  const [key, thumbnail] = data.images[image];
  const made = element("img", "");
  made.onload = () => made.classList.toggle("tiny", made.naturalWidth <= 64);
  made.src = thumbnail;
  made.alt = `Picture ${key}: ${words.slice(0, 120)}`;
  return made;
}

/** A picture with its key; `texts` makes what is shown beside it when it is enlarged. */
function thumbnail(image, words, texts) {
  const [key, found] = data.images[image];
  if (!found) return element("figure", "", element("div", "blank", "no picture in this page"), element("figcaption", "", key));
  const open = button(picture(image, words), () => enlarge(open, image, words, texts), "enlarge");
  open.title = "Enlarge";
  return element("figure", "", open, element("figcaption", "", key));
}

/** Runs `work` once before the next frame, however often it is asked for. */
function atNextFrame(work) {
  let due = 0;
  return () => {
    cancelAnimationFrame(due);
    due = requestAnimationFrame(work);
  };
}
