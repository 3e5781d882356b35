"use strict";
/* The page's script: re-decides every text from its scores, and shows what came of it. It only ever writes text
   content, never markup, and talks to nobody but, under `capfilt review`, to where the page came from. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.looks.length) return;
  const $ = (id) => document.getElementById(id);
  const SOURCES = ["web", "synthetic", "human"], MARKS = { kept: "✓", dropped: "✗", failed: "!" }, CARDS = 24;
  const filters = ["verdict", "source", "reason", "truth", "labelled", "words"].filter((id) => $(id));
  const state = { look: data.looks.length - 1, shown: CARDS, current: null };
  const look = () => data.looks[state.look], texts = () => look().texts;
  const count = (n) => n.toLocaleString("en"), percent = (share) => `${(100 * share).toFixed(1)} %`;

  /* ---- deciding ---- */
  const score = (i) => texts()[state.score][i];
  function why(i) {
    const fixed = texts().fixed[i];
    if (fixed >= 0) return data.reasons[fixed][1];
    if (score(i) === null) return `no ${state.score} score`;
    // Scores are 32-bit in the annotations; fround gives back the very number that the policy compares.
    return Math.fround(score(i)) >= state.threshold ? "" : `${state.score} below threshold`;
  }
  function verdict(i) {
    const fixed = texts().fixed[i];
    if (fixed >= 0 && data.reasons[fixed][2]) return "failed";
    return why(i) ? "dropped" : "kept";
  }
  function wilson(hits, total) {
    if (!total) return [0, 1];
    const z = 1.959964, share = hits / total, scale = 1 + z * z / total;
    const middle = share + z * z / (2 * total);
    const spread = z * Math.sqrt(share * (1 - share) / total + z * z / (4 * total * total));
    return [Math.max(0, (middle - spread) / scale), Math.min(1, (middle + spread) / scale)];
  }

  /* ---- what would be kept ---- */
  function tally() {
    const found = { in: SOURCES.map(() => 0), kept: SOURCES.map(() => 0), truth: counts(), labels: counts(), all: 0 };
    texts().image.forEach((_, i) => {
      const given = verdict(i), kept = given === "kept", source = texts().source[i];
      if (given === "failed") return;
      found.in[source] += 1;
      found.kept[source] += kept;
      // As in summary.json: the first web text of an image, where it has a score.
      const known = source === 0 && texts().candidate[i] === 0 && score(i) !== null ? texts().truth[i] : -1;
      note(found.truth, known, kept);
      const label = texts().label[i];
      found.all += label >= 0;
      note(found.labels, label === 0 || label === 1 ? label : -1, kept && score(i) !== null);
    });
    return found;
  }
  const counts = () => ({ total: 0, right: 0, kept: 0, both: 0 });
  function note(into, known, kept) {
    if (known < 0) return;
    into.total += 1; into.right += known; into.kept += kept; into.both += kept && known;
  }
  function live() {
    const found = tally(), parts = [];
    SOURCES.forEach((source, s) => {
      const total = look().totals[source] || 0;
      if (!total || !found.in[s]) return;
      const share = found.kept[s] / found.in[s], whole = found.in[s] === total;
      const told = whole ? `${count(found.kept[s])} of ${count(total)}` : `about ${count(Math.round(share * total))} of ${count(total)}`;
      parts.push([`${source}: `, told, ` kept, ${percent(share)}${whole ? "" : ` (from ${count(found.in[s])} drawn at random)`}`]);
    });
    if (found.truth.total) parts.push(...quality(found.truth, `${count(found.truth.total)} web texts of known truth: `, false));
    if (found.labels.total) parts.push(...quality(found.labels, `${count(found.labels.total)} random labels: `, true));
    if (found.all > found.labels.total) parts.push(["", count(found.all - found.labels.total), " labels given otherwise, not counted"]);
    $("live").replaceChildren(...parts.map(([before, figure, after]) => element("span", "", before, element("b", "", figure), after)));
  }
  function quality(c, before, interval) {
    const told = (name, hits, total) => {
      if (!total) return `${name} –`;
      const [low, high] = wilson(hits, total);
      return `${name} ${(hits / total).toFixed(3)}${interval ? ` [${low.toFixed(2)}, ${high.toFixed(2)}]` : ""}`;
    };
    return [[before, `${told("precision", c.both, c.kept)}, ${told("recall", c.both, c.right)}`, interval ? " (95 % intervals)" : ""]];
  }
  function histograms() {
    document.querySelectorAll(".chart[data-look]").forEach((chart) => {
      chart.hidden = Number(chart.dataset.look) !== state.look || chart.dataset.score !== state.score;
      const svg = chart.querySelector("svg[data-low]"), cut = svg.querySelector(".cut");
      const { low, high, left, right } = Object.fromEntries(Object.entries(svg.dataset).map(([k, v]) => [k, Number(v)]));
      const x = left + (right - left) * Math.min(1, Math.max(0, (state.threshold - low) / (high - low)));
      cut.setAttribute("x1", x); cut.setAttribute("x2", x);
    });
  }
  function command() {
    const t = state.threshold;
    return `${look().select} --out ${look().out}-${state.score}-${t.toFixed(3)} --set score=${state.score} --set threshold=${t}`;
  }

  /* ---- the gallery ---- */
  function passes(i, wanted) {
    const given = verdict(i), truth = texts().truth[i];
    if (wanted.verdict && given !== wanted.verdict) return false;
    if (wanted.source && SOURCES[texts().source[i]] !== wanted.source) return false;
    if (wanted.reason && why(i) !== wanted.reason) return false;
    if (wanted.truth === "err" ? truth < 0 || (truth === 1) === (given === "kept") : wanted.truth && truth !== (wanted.truth === "right" ? 1 : 0)) return false;
    if (wanted.labelled && (texts().label[i] >= 0) !== (wanted.labelled === "yes")) return false;
    return !wanted.words || texts().text[i].toLowerCase().includes(wanted.words.toLowerCase());
  }
  function order(i, sort) {
    if (sort === "random") return texts().image[i];
    if (score(i) === null) return Infinity;
    return sort === "close" ? Math.abs(score(i) - state.threshold) : sort === "low" ? score(i) : -score(i);
  }
  /** Images with at least one text that passes, each with all of its texts, the nearest first. */
  function matching() {
    const wanted = Object.fromEntries(filters.map((id) => [id, $(id).value.trim()]));
    const sort = $("sort").value, found = new Map(), all = new Map();
    texts().image.forEach((image, i) => {
      if (!all.has(image)) all.set(image, []);
      all.get(image).push(i);
      if (!passes(i, wanted)) return;
      const place = order(i, sort), card = found.get(image);
      if (card) { card.place = Math.min(card.place, place); card.texts += 1; }
      else found.set(image, { image, place, texts: 1, rows: all.get(image) });
    });
    return [...found.values()].sort((a, b) => a.place - b.place || a.image - b.image);
  }
  function gallery() {
    const cards = matching(), num = cards.reduce((sum, card) => sum + card.texts, 0);
    $("found").textContent = cards.length ? `${count(num)} texts of ${count(cards.length)} images in this page` : "No text in this page is like that.";
    $("cards").replaceChildren(...cards.slice(0, state.shown).map(drawn));
    $("more").hidden = cards.length <= state.shown;
  }
  function drawn(card) {
    const [key, thumb] = data.images[card.image];
    let picture = element("div", "blank", "no picture in this page");
    if (thumb) {
      picture = element("img", "");
      picture.onload = () => picture.classList.toggle("tiny", picture.naturalWidth <= 64);
      picture.src = thumb;
      picture.alt = `Picture ${key}: ${texts().text[card.rows[0]].slice(0, 120)}`;
    }
    return element("article", "card", element("figure", "", picture, element("figcaption", "", key)), element("ul", "", ...card.rows.map(line)));
  }
  function line(i) {
    const given = verdict(i), truth = texts().truth[i], kind = texts().kind[i], cut = look().cut[i];
    const figure = (name) => {
      const value = texts()[name][i], told = `${name} ${value === null ? "–" : value.toFixed(3)}`;
      return element(name === state.score ? "b" : "span", "", told);
    };
    const fixed = texts().fixed[i], reason = fixed >= 0 ? data.reasons[fixed][0] : why(i);
    const said = element("bdi", "", texts().text[i]);
    said.dir = "auto";
    said.id = `said-${i}`;
    // Who is asked must not be led: at random, a verdict is shown once the person has given theirs.
    const blind = data.review && given !== "failed" && texts().label[i] < 0 && $("sort").value === "random";
    const row = element("li", blind ? "text" : `text ${given}`,
      element("div", "meta", blind ? "" : element("b", "mark-word", `${MARKS[given]} ${given}`), element("span", "", "T", element("sub", "", SOURCES[texts().source[i]][0]), ` ${SOURCES[texts().source[i]]}`)),
      element("p", "said", said, cut ? ` … (${count(cut)} characters)` : ""),
      blind ? "" : element("div", "meta", figure("itm"), figure("itc"), reason ? element("span", "", reason) : "", truth >= 0 ? element("span", "", truth ? "truly right" : `truly wrong${kind >= 0 ? `: ${data.kinds[kind]}` : ""}`) : "", labelled(i)));
    row.dataset.row = i;
    if (data.review && given !== "failed") row.append(asked(i));
    return row;
  }
  function labelled(i) {
    const label = texts().label[i];
    return label < 0 || data.review ? "" : element("span", "", `labelled ${label % 2 ? "right" : "wrong"}`);
  }

  /* ---- labels, under `capfilt review` ---- */
  function asked(i) {
    const button = (word, value) => {
      const made = element("button", "", word);
      made.type = "button";
      made.setAttribute("aria-describedby", `said-${i}`);
      made.setAttribute("aria-pressed", texts().label[i] >= 0 && texts().label[i] % 2 === value);
      made.onclick = () => give(i, made.getAttribute("aria-pressed") === "true" ? "none" : word);
      return made;
    };
    return element("div", "asked", button("right", 1), button("wrong", 0));
  }
  async function give(i, word) {
    const at = state.look, random = $("sort").value === "random" && filters.every((id) => !$(id).value.trim());
    try {
      const answer = await fetch(`/labels${location.search}`, {
        method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ look: at, row: i, verdict: word, at_random: random }),
      });
      if (!answer.ok) throw new Error(await answer.text());
      const { labels } = await answer.json();
      labels.forEach(([l, row, value]) => { data.looks[l].texts.label[row] = value; });
      $("saved").textContent = `Saved: ${word === "none" ? "label taken back" : word}.`;
    } catch (error) {
      $("saved").textContent = `Not saved: ${error.message}. Is capfilt review still running?`;
      return false;
    }
    const old = document.querySelector(`[data-row="${i}"]`);
    if (old && at === state.look) {
      const focused = old.contains(document.activeElement) ? [...old.querySelectorAll("button")].indexOf(document.activeElement) : -1;
      const made = line(i);
      made.classList.toggle("current", old.classList.contains("current"));
      old.replaceWith(made);
      if (focused >= 0) made.querySelectorAll("button")[focused].focus();
    }
    live();
    return true;
  }
  function move(by) {
    const rows = [...document.querySelectorAll("#cards .text")];
    const next = rows[Math.min(rows.length - 1, Math.max(0, rows.findIndex((row) => row.classList.contains("current")) + by))];
    rows.forEach((row) => row.classList.toggle("current", row === next));
    if (next) next.scrollIntoView({ block: "center" });
  }
  function key(event) {
    if (!data.review || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const row = document.querySelector("#cards .text.current"), word = { r: "right", w: "wrong", u: "none" }[event.key];
    if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
    else if (word && row && row.querySelector(".asked")) give(Number(row.dataset.row), word).then((kept) => kept && word !== "none" && move(1));
  }

  /* ---- controls ---- */
  function element(name, kind, ...inside) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    made.append(...inside);
    return made;
  }
  let due = 0;
  function refresh() {
    state.shown = CARDS;
    cancelAnimationFrame(due);
    due = requestAnimationFrame(draw);
  }
  function draw() {
    live(); histograms(); reasons(); gallery();
    $("command").textContent = command();
  }
  function reasons() {
    const found = new Set(texts().image.map((_, i) => why(i)).filter(Boolean)), chosen = $("reason").value;
    const options = ["", ...[...found].sort()].map((reason) => new Option(reason || "any", reason, false, reason === chosen));
    $("reason").replaceChildren(...options);
  }
  function set(threshold, from) {
    if (!Number.isFinite(threshold)) return;
    state.threshold = threshold;
    if (from !== "slider") $("slider").value = threshold;
    if (from !== "threshold") $("threshold").value = Number(threshold.toFixed(6));
    $("slider").setAttribute("aria-valuetext", threshold.toFixed(3));
    refresh();
  }
  function judgeBy(name) {
    const [low, high] = look().ranges[name], slider = $("slider");
    Object.assign(slider, { min: low, max: high, step: 0.001 });
    $("score").value = state.score = name;
  }
  /** Another score: from the threshold that keeps as many texts as the one before. */
  function another(name) {
    const kept = texts().image.filter((_, i) => verdict(i) === "kept").length;
    const sorted = texts()[name].filter((value, i) => value !== null && texts().fixed[i] < 0).sort((a, b) => b - a);
    judgeBy(name);
    set(name === look().score ? look().threshold : Math.floor(1000 * (sorted[Math.max(0, kept - 1)] ?? 0.5)) / 1000);
  }
  function open(index) {
    state.look = index;
    $("look").value = index;
    judgeBy(look().score);
    set(look().threshold);
  }
  function copy() {
    const done = (words) => { $("copied").textContent = words; };
    const select = () => { getSelection().selectAllChildren($("command")); done("Selected: press Ctrl+C."); };
    if (!navigator.clipboard) return select();
    navigator.clipboard.writeText(command()).then(() => done("Copied."), select);
  }
  $("slider").oninput = (event) => set(Number(event.target.value), "slider");
  $("threshold").oninput = (event) => event.target.value.trim() && set(Number(event.target.value), "threshold");
  $("look").onchange = (event) => open(Number(event.target.value));
  $("score").onchange = (event) => another(event.target.value);
  $("reset").onclick = () => open(state.look);
  $("copy").onclick = copy;
  $("more").onclick = () => { state.shown += CARDS; gallery(); };
  [...filters, "sort"].forEach((id) => $(id).addEventListener("input", refresh));
  document.addEventListener("keydown", key);
  if (!data.looks.some((own) => own.texts.truth.some((truth) => truth >= 0))) $("truth").closest(".field").hidden = true;
  if (data.review) $("sort").value = "random";
  open(state.look);
})();
