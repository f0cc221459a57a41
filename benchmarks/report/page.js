// The page is whole without this: here tables sort, clips play together, and a link to a row opens
// the table that holds it.
// Dates, names and commits begin with digits, too, but are no numbers.
const number = (text) =>
  /^[-+]?[\d,.]+(e[-+]\d+)?(?![\w-])/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN;

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent;
      const compare = (a, b) => {
        const difference = number(key(a)) - number(key(b));
        return Number.isNaN(difference) ? key(a).localeCompare(key(b), undefined, { numeric: true }) : difference;
      };
      body.append(...[...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a))));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}

const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target?.closest("details");
  if (folded) folded.open = true;
  if (target) target.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", reveal);
if (location.hash) reveal();

const videos = [...document.querySelectorAll("video")];
const button = document.querySelector("button[data-play]");
const toggle = (play) => {
  for (const video of videos) {
    if (play) {
      video.currentTime = 0;
      video.play().catch(() => {});
    } else video.pause();
  }
  button.textContent = play ? "Pause all clips" : "Play all clips";
};
if (button) {
  button.hidden = false;
  for (const video of videos) {
    video.controls = false;
    video.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  }
  button.addEventListener("click", () => toggle(videos.every((video) => video.paused)));
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) toggle(true);
}
