// The crops of the tab Compare follow the pointer: each shows the place that the pointer is at, of its own image.
document.addEventListener("pointermove", (event) => {
  const image = event.target.closest?.(".lc-grid img");
  if (!image) return;
  const box = image.getBoundingClientRect();
  const across = (100 * (event.clientX - box.left)) / box.width;
  const down = (100 * (event.clientY - box.top)) / box.height;
  for (const crop of image.closest(".lc-grid").querySelectorAll(".lc-crop")) {
    crop.style.backgroundPosition = `${across}% ${down}%`;
  }
});
