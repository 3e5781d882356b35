/* Rows as CSV. Texts are the web's, and a spreadsheet runs a cell that begins with = + - @ as a formula. So such a sign
   gets an apostrophe before it: at the beginning of a text, and behind whatever a spreadsheet with other settings would
   take for the end of a cell. */
const FORMULA = /(^|[;|\t\r\n])([\s\ufeff\u200b-\u200f\u202a-\u202e\u2066-\u2069]*)([=+\-@\uff1d\uff0b\uff0d\uff20])/g;

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const safe = String(value).replaceAll("\0", "\ufffd").replace(FORMULA, "$1$2'$3");
  return `"${safe.replaceAll('"', '""')}"`;
}

/** Saves rows under headings as a file that spreadsheets read as UTF-8. */
function saveCsv(name, headings, rows) {
  const lines = [headings, ...rows].map((row) => row.map(csvCell).join(","));
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob([`\ufeff${lines.join("\r\n")}\r\n`], { type: "text/csv;charset=utf-8" }));
  link.download = `${data.name.replace(/[^\p{L}\p{N}._-]+/gu, "-").slice(0, 80)}-${name}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
