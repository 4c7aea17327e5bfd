// Keeps an event's life line fresh until nothing more is to come: at once after the page, for what Kafka knows, then
// every few seconds while the page is looked at.
(() => {
  const QUICK_MS = 2500;
  const SLOW_MS = 10000;
  const QUICK_ROUNDS = 40;
  const TIMEOUT_MS = 15000;
  const way = document.getElementById("event-way");
  const news = document.getElementById("event-news");
  const stale = document.getElementById("event-stale");
  let timer = 0;
  let rounds = 0;
  let busy = false;
  let failures = 0;

  const isSettled = () => document.getElementById("life-line").dataset.settled === "true";
  const state = () => document.getElementById("event-state").textContent;

  // Focus and opened details stay where they are.
  function show(html) {
    const href = way.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const summary = way.contains(document.activeElement) && document.activeElement.tagName === "SUMMARY";
    const summaries = [...way.querySelectorAll("summary")];
    const focused = summary ? summaries.indexOf(document.activeElement) : -1;
    const opened = [...way.querySelectorAll("details")].map((one) => one.open);
    const before = state();
    way.innerHTML = html;
    way.querySelectorAll("details").forEach((one, number) => {
      if (number < opened.length) one.open = opened[number];
    });
    if (href) [...way.querySelectorAll("a")].find((link) => link.getAttribute("href") === href)?.focus();
    if (focused >= 0) way.querySelectorAll("summary")[focused]?.focus();
    if (state() !== before) news.textContent = state();
  }

  async function refresh() {
    if (busy || document.hidden) return;
    busy = true;
    rounds += 1;
    try {
      const answer = await fetch(way.dataset.url, { signal: AbortSignal.timeout(TIMEOUT_MS) });
      // Logged out, or no longer allowed to: asking again would not help.
      if (answer.redirected || [403, 404].includes(answer.status)) return giveUp();
      if (!answer.ok) throw new Error(answer.status);
      show(await answer.text());
      failures = 0;
      stale.hidden = true;
    } catch {
      failures += 1;
      stale.hidden = failures < 3;
    } finally {
      busy = false;
    }
    plan();
  }

  function giveUp() {
    stale.hidden = false;
    document.removeEventListener("visibilitychange", look);
  }

  function plan() {
    clearTimeout(timer);
    if (!document.hidden && (failures || !isSettled())) timer = setTimeout(refresh, rounds < QUICK_ROUNDS ? QUICK_MS : SLOW_MS);
  }

  function look() {
    clearTimeout(timer);
    // Something may have been done about it meanwhile.
    if (!document.hidden) {
      rounds = 0;
      refresh();
    }
  }

  document.addEventListener("visibilitychange", look);
  refresh();
})();
