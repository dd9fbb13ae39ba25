// The buttons of the header that open the menu and the search on narrow screens are labels: makes them take the focus.
// The theme clicks a label with the focus at Enter.
for (const label of document.querySelectorAll("label.md-header__button[for='__drawer'], label.md-header__button[for='__search']")) {
  label.tabIndex = 0
  label.setAttribute("role", "button")
  label.setAttribute("aria-label", label.htmlFor === "__drawer" ? "Menu" : "Search")
}
