// The address tells the open tab and run, so that a reload, a bookmark and the back button work.
const asked = new URL(location.href).searchParams;
window.studio = {
  opened: [asked.get('tab') || '', asked.get('run') || ''],
  started: false,
  start() { window.studio.started = true; },
  remember(key, value) {
    if (!window.studio.started) return;
    const url = new URL(location.href);
    if (value === null || value === undefined || url.searchParams.get(key) === String(value)) return;
    url.searchParams.set(key, value);
    if (key === 'tab') history.pushState(null, '', url); else history.replaceState(null, '', url);
  },
};
window.addEventListener('popstate', () => {
  const tab = new URL(location.href).searchParams.get('tab') || 'datasets';
  const wanted = [...document.querySelectorAll('button[role=tab]')]
    .find((b) => b.textContent.trim().toLowerCase() === tab);
  if (wanted && wanted.getAttribute('aria-selected') !== 'true') wanted.click();
});
