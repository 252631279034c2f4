"use strict";
(() => {
  const tip = document.getElementById("tip");

  const show = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const space = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, space)) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  };

  const placeIn = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };

  const nearest = (steps, step, held) => {
    let low = 0, high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle + 1; else high = middle;
    }
    const before = low - 1;
    if (held || low === steps.length || before < 0) return held ? before : Math.max(0, before);
    return step - steps[before] <= steps[low] - step ? before : low;
  };

  const follow = (figure, textAt) => {
    const svg = figure.querySelector("svg");
    const data = JSON.parse(figure.querySelector("script").textContent.replaceAll("&lt;", "<"));
    const [left, right, top, foot] = data.frame;
    const cross = document.createElementNS(svg.namespaceURI, "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("visibility", "hidden");
    svg.append(cross);
    const hide = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = placeIn(svg, event);
      const text = x >= left && x <= right && y >= top && y <= foot ? textAt(data, x, y) : null;
      if (text === null) { hide(); return; }
      for (const [name, value] of [["x1", x], ["x2", x], ["y1", top], ["y2", foot]]) cross.setAttribute(name, value);
      cross.setAttribute("visibility", "visible");
      show(event, text);
    });
  };

  const lineText = (data, x) => {
    const [left, right] = data.frame;
    const [first, last] = data.steps;
    const step = first + (x - left) / (right - left) * (last - first);
    const facts = data.lines.map((line) => {
      const index = nearest(line.x, step, line.held);
      if (index < 0) return null;
      const at = line.held ? "" : " (step " + line.x[index].toLocaleString("en") + ")";
      return line.label + ": " + line.y[index] + at;
    });
    return ["step " + Math.round(step).toLocaleString("en"), ...facts.filter((fact) => fact !== null)].join("\n");
  };

  const heatText = (data, x, y) => {
    const [left, right, top, foot] = data.frame;
    const index = (at, start, end, count) => Math.min(count - 1, Math.floor((at - start) / (end - start) * count));
    const row = index(y, top, foot, data.rows.length), column = index(x, left, right, data.columns.length);
    const value = data.values[row][column];
    const shown = data.percent ? (value * 100).toFixed(2).replace(/\.?0+$/, "") + "%" : String(value);
    return data.rows[row] + "\n" + data.columnTitle + " " + data.columns[column] + ": " + (value < 0 ? "none" : shown);
  };

  const number = (text) => {
    const [, digits, letter] = /^([-\d.,]+)\s*([kMGTP]?)/.exec(text) || [];
    return digits === undefined ? NaN : Number(digits.replaceAll(",", "")) * 1000 ** " kMGTP".indexOf(letter || " ");
  };

  const sortBy = (table, column, heading) => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const numbers = number(key(a)) - number(key(b));
      const order = heading.classList.contains("num") && !Number.isNaN(numbers)
        ? numbers : key(a).localeCompare(key(b), "en", { numeric: true });
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  };

  document.querySelectorAll("figure.lines").forEach((figure) => follow(figure, lineText));
  document.querySelectorAll("figure.heat").forEach((figure) => follow(figure, heatText));
  document.querySelectorAll("th button").forEach((button) => {
    const heading = button.parentElement;
    button.addEventListener("click", () => sortBy(heading.closest("table"), heading.cellIndex, heading));
  });
  document.documentElement.dataset.ready = "true";
})();
