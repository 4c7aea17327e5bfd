// The theme makes buttons of some spans and divs. Here they become buttons for the keyboard and for screen readers too,
// and its icons, which are words set in a font of pictures, are kept from being read out.
const LABELS = {
  dock_to_right: "Show or hide the navigation",
  close: "Close",
  unfold_more: "Account and theme",
  visibility: "Show or hide the password",
  chevron_right: "Show or hide",
  monitor_heart: "Overview",
  more_vert: "More",
};
const CONTROLS = "a[href], button, input, select, textarea, summary, label";

function hideIcons(root) {
  for (const icon of root.querySelectorAll(".material-symbols-outlined")) {
    if (!icon.hasAttribute("x-on:click")) icon.setAttribute("aria-hidden", "true");
  }
}

function makeButton(element) {
  const icon = element.matches(".material-symbols-outlined") ? element : element.querySelector(".material-symbols-outlined");
  element.setAttribute("role", "button");
  element.setAttribute("tabindex", "0");
  const words = [...element.childNodes].some((node) => node !== icon && node.textContent.trim());
  if (icon && (icon === element || !words)) {
    element.setAttribute("aria-label", LABELS[icon.textContent.trim()] || icon.textContent.trim().replaceAll("_", " "));
  }
  element.addEventListener("keydown", (event) => {
    if (event.target === element && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      element.click();
    }
  });
}

// A link or button that is an icon alone is named by what the icon means.
function nameIconControls(root) {
  for (const control of root.querySelectorAll("a, button")) {
    const icon = control.querySelector(".material-symbols-outlined");
    const words = icon && control.textContent.replace(icon.textContent, "").trim();
    if (icon && !words && !control.hasAttribute("aria-label") && !control.title) {
      const name = icon.textContent.trim();
      control.setAttribute("aria-label", LABELS[name] || name.replaceAll("_", " "));
    }
  }
}

// Boxes that scroll all have the same name: told apart by number.
function nameScrollBoxes() {
  document.querySelectorAll(".simplebar-content-wrapper[role=region]").forEach((box, number) => {
    box.setAttribute("aria-label", box.closest("#nav-sidebar") ? "Navigation" : `Scrollable content ${number + 1}`);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll("[x-on\\:click]")) {
    const isBackdrop = element.id === "changelist-filter-close";
    if (!element.matches(CONTROLS) && !element.querySelector(CONTROLS) && !isBackdrop) makeButton(element);
  }
  nameIconControls(document);
  hideIcons(document);
});
window.addEventListener("load", nameScrollBoxes);
