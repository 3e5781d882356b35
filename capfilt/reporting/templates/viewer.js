/* The dialog that shows a picture as large as the page has it, with its texts unfolded. The browser keeps the focus
   inside, closes it on Escape, and gives the focus back to the picture. */
let enlarged = null; // the button of the picture that the dialog shows

function enlarge(from, image, words, texts) {
  const viewer = $("viewer");
  enlarged = from;
  $("viewer-key").textContent = data.images[image][0];
  $("viewer-picture").replaceChildren(picture(image, words));
  $("viewer-texts").replaceChildren(...texts());
  if (!viewer.open) viewer.showModal();
  viewer.scrollTop = 0;
}

/** The picture before (-1) or after (1) the enlarged one, of those that are shown. */
function enlargeNext(by) {
  const shown = [...document.querySelectorAll("#cards .enlarge")];
  const now = shown.indexOf(enlarged);
  if (now >= 0 && shown[now + by]) shown[now + by].click();
}

$("viewer-close").onclick = () => $("viewer").close();
$("viewer").addEventListener("click", (event) => event.target === $("viewer") && $("viewer").close());
$("viewer").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) enlargeNext(by);
});
