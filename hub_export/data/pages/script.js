"use strict";

// Whatever is read here is on the page without this script, too.

function show(status, shown, all) {
  status.textContent = shown === all ? `${all}` : `${shown} of ${all}`;
}

function nameHost() {
  if (!/^https?:$/.test(location.protocol)) {
    return;
  }
  const root = new URL(document.documentElement.dataset.root, location.href);
  const address = (root.origin + root.pathname).replace(/\/$/, "");
  for (const host of document.querySelectorAll(".host")) {
    host.textContent = address;
  }
  for (const note of document.querySelectorAll("[data-host-note]")) {
    note.hidden = true;
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard outside of https and localhost, or not allowed.
  }
  const area = document.createElement("textarea");
  area.className = "gone";
  area.value = text;
  area.readOnly = true;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}

function addCopyButtons() {
  for (const block of document.querySelectorAll(".code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    const name = block.querySelector("pre").getAttribute("aria-label");
    button.setAttribute("aria-label", `Copy: ${name}`);
    button.addEventListener("click", async () => {
      const copied = await copy(block.querySelector("code").textContent);
      button.textContent = copied ? "Copied" : "Select it and copy";
      button.focus();
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    button.setAttribute("aria-live", "polite");
    block.append(button);
  }
}

function filterModels(section) {
  const form = section.querySelector("form");
  const body = section.querySelector("tbody");
  const status = form.querySelector("[role=status]");
  const facets = [...form.querySelectorAll("select:not([name=sort])")];
  const rows = [...body.rows].map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
  }));
  const orders = {
    "": () => 0,
    size: (a, b) => a.dataset.bytes - b.dataset.bytes,
    "-size": (a, b) => b.dataset.bytes - a.dataset.bytes,
    "-published": (a, b) =>
      (a.dataset.published < b.dataset.published) -
      (a.dataset.published > b.dataset.published),
  };
  let order = "";

  function fits(row, words, without) {
    return (
      words.every((word) => row.text.includes(word)) &&
      facets.every(
        (facet) =>
          facet === without ||
          !facet.value ||
          row.element.dataset[facet.name] === facet.value,
      )
    );
  }

  function apply() {
    const words = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fit = fits(row, words, null);
      row.element.hidden = !fit;
      shown += fit;
    }
    for (const facet of facets) {
      const counts = new Map();
      for (const row of rows) {
        if (fits(row, words, facet)) {
          const value = row.element.dataset[facet.name];
          counts.set(value, (counts.get(value) ?? 0) + 1);
        }
      }
      for (const option of facet.options) {
        if (option.value) {
          const count = counts.get(option.value) ?? 0;
          option.textContent = `${option.dataset.name} (${count})`;
        }
      }
    }
    if (form.elements.sort.value !== order) {
      order = form.elements.sort.value;
      const compare = orders[order];
      const sorted = rows.map((row) => row.element);
      sorted.sort((a, b) => compare(a, b));
      body.append(...sorted);
    }
    show(status, shown, rows.length);
    status.textContent += rows.length === 1 ? " model" : " models";
  }

  function fields() {
    return [form.elements.q, ...facets, form.elements.sort];
  }

  function save() {
    const state = new URLSearchParams();
    for (const field of fields()) {
      if (field.value) {
        state.set(field.name, field.value);
      }
    }
    const hash = state.toString();
    history.replaceState(
      null,
      "",
      hash ? `#${hash}` : location.pathname + location.search,
    );
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const field of fields()) {
      field.value = state.get(field.name) ?? "";
      if (field.selectedIndex === -1) {
        field.value = "";
      }
    }
    apply();
  }

  form.addEventListener("input", () => {
    apply();
    save();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const field of fields()) {
      field.value = "";
    }
    apply();
    save();
  });
  addEventListener("hashchange", restore);
  addEventListener("pageshow", restore);
  form.hidden = false;
  restore();
}

function filterLabels(details) {
  const list = details.querySelector("pre");
  const field = details.querySelector("input");
  const status = details.querySelector("[role=status]");
  const lines = list.textContent.replace(/^\n|\n$/g, "").split("\n");
  const folded = lines.map((line) => line.toLowerCase());
  let due = false;

  function apply() {
    due = false;
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = lines.filter((_, index) =>
      words.every((word) => folded[index].includes(word)),
    );
    list.textContent = found.join("\n");
    list.scrollTop = 0;
    show(status, found.length, lines.length);
  }

  field.addEventListener("input", () => {
    if (!due) {
      due = true;
      requestAnimationFrame(apply);
    }
  });
  field.parentElement.hidden = false;
  show(status, lines.length, lines.length);
}

nameHost();
addCopyButtons();
document.querySelectorAll(".models:has(form)").forEach(filterModels);
document.querySelectorAll("#labels").forEach(filterLabels);
