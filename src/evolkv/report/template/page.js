"use strict";
// Charts are read by pointing, tapping, or arrow keys. What they say stands in their tables.
const tip = document.getElementById("tip");
document.querySelector(".hint").hidden = false;

// Where the values of a plot stand, in fractions of its box, and in which cell of the table.
function valuesOf(plot) {
  const { columns, rows } = plot.dataset;
  if (columns) {
    const [wide, high] = [Number(columns), Number(rows)];
    const values = [];
    for (let y = 0; y < high; y++) {
      for (let x = 0; x < wide; x++) {
        const [row, column] = "layersAcross" in plot.dataset ? [x, y + 1] : [y, x + 1];
        values.push({ x: (x + 0.5) / wide, y: (y + 0.5) / high, row, column });
      }
    }
    return values;
  }
  const dots = Array.from(plot.querySelectorAll("[data-points]"), (path) => path.getAttribute("d")).join("");
  if (dots) {
    const places = dots.matchAll(/M(\S+) ([^h]+)h0/g);
    return Array.from(places, ([, x, y], row) => ({ x: x / 1000, y: y / 1000, row }));
  }
  const part = (mark, name) => parseFloat(mark.getAttribute(name) ?? "0") / 100;
  return Array.from(plot.querySelectorAll("[data-row]"), (mark) => ({
    x: part(mark, "x") + part(mark, "width") / 2,
    y: part(mark, "y"),
    row: Number(mark.dataset.row),
    line: mark.tagName === "rect",
  })).sort((a, b) => a.x - b.x || a.row - b.row);
}

function textOf(table, { row, column, line }) {
  const heads = table.tHead.rows[0].cells;
  const cells = table.tBodies[0].rows[row].cells;
  const say = (cell) => cell.textContent.trim();
  if (column) {
    return `${say(heads[0])} ${say(cells[0])}, ${say(heads[column])}: ${say(cells[column])}`;
  }
  if (line) {
    const last = cells.length - 1;
    return `${say(heads[0])} ${say(cells[0])}, ${say(heads[last])}: ${say(cells[last])}`;
  }
  return Array.from(cells, (cell, i) => (say(cell) ? `${say(heads[i])} ${say(cell)}` : "")).filter(Boolean).join("\n");
}

function enliven(plot) {
  const table = document.getElementById(plot.dataset.table);
  const wide = Number(plot.dataset.columns);
  let values, cursor;
  let at = -1;

  function start() {
    if (values) return;
    values = valuesOf(plot);
    cursor = plot.appendChild(document.createElement("div"));
    cursor.className = wide ? "cursor" : "cursor ring";
  }
  function hide() {
    tip.hidden = true;
    if (cursor) cursor.hidden = true;
  }
  function show(index) {
    at = index;
    const value = values[at];
    const box = plot.getBoundingClientRect();
    if (wide) {
      const size = [box.width / wide, box.height / Number(plot.dataset.rows)];
      Object.assign(cursor.style, {
        left: `${value.x * box.width - size[0] / 2 - 1}px`,
        top: `${value.y * box.height - size[1] / 2 - 1}px`,
        width: `${size[0] + 2}px`,
        height: `${size[1] + 2}px`,
      });
    } else {
      Object.assign(cursor.style, { left: `${value.x * 100}%`, top: `${value.y * 100}%` });
    }
    cursor.hidden = tip.hidden = false;
    tip.textContent = textOf(table, value);
    const left = box.left + value.x * box.width;
    const top = box.top + value.y * box.height;
    const { offsetWidth, offsetHeight } = tip;
    const { clientWidth, clientHeight } = document.documentElement;
    const within = (place, size, all) => `${Math.max(8, Math.min(all - size - 8, place))}px`;
    if (offsetHeight > 48) {
      // Many lines stand beside the value, where they hide the least.
      const right = left + 18 + offsetWidth < clientWidth;
      tip.style.left = within(right ? left + 18 : left - 18 - offsetWidth, offsetWidth, clientWidth);
      tip.style.top = within(top - offsetHeight / 2, offsetHeight, clientHeight);
    } else {
      tip.style.left = within(left - offsetWidth / 2, offsetWidth, clientWidth);
      tip.style.top = `${top - offsetHeight - 14 > 0 ? top - offsetHeight - 14 : top + 16}px`;
    }
  }
  function point(event) {
    start();
    const box = plot.getBoundingClientRect();
    let nearest = Infinity;
    let index = -1;
    values.forEach((value, i) => {
      const x = box.left + value.x * box.width - event.clientX;
      const y = value.line ? 0 : box.top + value.y * box.height - event.clientY;
      if (x * x + y * y < nearest) [nearest, index] = [x * x + y * y, i];
    });
    if (index >= 0) show(index);
  }
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    start();
    const leap = wide || Math.ceil(values.length / 20);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: leap, ArrowUp: -leap };
    if (event.key === "Escape") hide();
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(values.length - 1);
    else if (event.key in steps) {
      const next = at < 0 ? 0 : at + steps[event.key];
      if (next >= 0 && next < values.length) show(next);
    } else return;
    event.preventDefault();
  });
}

document.querySelectorAll(".plot").forEach(enliven);
// A file that was opened from disk has a clipboard in some browsers only; a click on the text selects it in all.
for (const box of navigator.clipboard ? document.querySelectorAll(".copy") : []) {
  const button = box.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(box.querySelector("code").innerText.trim());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
