// What the theme's templates say inline, registered for Alpine's CSP build, which evaluates no JavaScript and knows no
// globals: components by name, and the two globals that its expressions use.
document.addEventListener("alpine:init", () => {
  for (const component of [theme, searchForm, searchDropdown, searchCommand]) {
    Alpine.data(component.name, component);
  }
  Alpine.data("page", () => ({
    activeTab: "",
    sidebarMobileOpen: false,
    sidebarDesktopOpen: localStorage.getItem("sidebarDesktopOpen") !== "0",
    window: { location: { pathname: location.pathname, search: location.search } },
    localStorage: { setItem: (name, value) => localStorage.setItem(name, value) },
    init() {
      const tab = this.$el.dataset.tab;
      this.activeTab = tab === undefined ? "" : getCurrentTab() || tab;
    },
  }));
});
