"""The report's look: one style sheet and one script, both written into the page itself."""

from __future__ import annotations

from goku.page_style import STYLE

__all__ = ["SCRIPT", "STYLE"]

# Two comforts and nothing else: clips play only while they can be seen, and a chart tells its
# values under the pointer. The page is complete without them.
SCRIPT = """
const clips = document.querySelectorAll("video");
if ("IntersectionObserver" in window) {
  const seen = new IntersectionObserver((entries) => entries.forEach((e) => {
    if (e.isIntersecting) e.target.play().catch(() => {}); else e.target.pause();
  }), { rootMargin: "80px" });
  clips.forEach((clip) => seen.observe(clip));
}
const tip = document.createElement("div");
tip.className = "tip"; tip.hidden = true; document.body.append(tip);
document.querySelectorAll("svg.plot").forEach((svg) => {
  const data = JSON.parse(svg.dataset.plot), cursor = svg.querySelector(".cursor");
  const [width, left, right] = [%WIDTH%, %LEFT%, %RIGHT%];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    const part = Math.min(1, Math.max(0, (at - left) / (width - left - right)));
    const x = data.x[0] + part * (data.x[1] - data.x[0]);
    tip.replaceChildren();
    let shown = x;
    data.s.forEach(([label, colour, points]) => {
      if (!points.length) return;
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      shown = near[0];
      const row = document.createElement("span");
      row.className = "c" + colour;
      const where = Math.round(near[0] * 100) / 100;
      row.textContent = label + ": " + near[1].toPrecision(4) + "  (" + where + ")";
      tip.append(row);
    });
    const px = left + (shown - data.x[0]) / (data.x[1] - data.x[0] || 1) * (width - left - right);
    cursor.setAttribute("x1", px); cursor.setAttribute("x2", px);
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true; cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9);
  });
});
"""
