// The upload box: sends files in pieces (tus 1.0), one after the other; pause, cancel, retry, and
// go on after a reload. Routes: studio/ui/upload_routes.py. No library, nothing is loaded.
const MIB = 2 ** 20;
// A piece takes about a second, so that progress shows on any line; what arrived of one that broke
// is kept. Large pieces on fast lines: with 16 MiB 400 MiB took 2.9 s, with 64 MiB 2.4 s.
const SMALLEST = MIB / 4, FIRST = 4 * MIB, LARGEST = 64 * MIB, WANTED_MS = 1000;
// Refusals that may pass; any other 4xx stands however often it is asked.
const PASSING = [404, 408, 409, 423, 429, 500, 502, 503, 504];
const TRIES = 10, LONGEST_WAIT_MS = 15000;
const ROUTE = new URL('uploads', location.href);
const box = element.querySelector('.uploads');
const picker = box.querySelector('input'), zone = box.querySelector('.dropzone');
const list = box.querySelector('.uploadlist'), status = box.querySelector('.uploadsay');
const items = [];
let current = null;

const make = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const size = (bytes) => bytes >= 1000 * MIB ? `${(bytes / 1024 / MIB).toFixed(2)} GiB`
  : bytes >= MIB ? `${(bytes / MIB).toFixed(bytes < 10 * MIB ? 1 : 0)} MiB`
  : bytes >= 1024 ? `${(bytes / 1024).toFixed(0)} KiB` : `${bytes} bytes`;
const duration = (seconds) => seconds < 90 ? `${Math.max(1, Math.round(seconds))} s`
  : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
// In a sentence, control and bidi characters of a file name would change how the rest of it reads.
const plain = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, '\ufffd');
const say = (text) => { status.textContent = text; };
const key = (file) => `studio-upload:${file.name}:${file.size}:${file.lastModified}`;
// Without storage (private windows of some browsers) only going on after a reload is lost.
const remembered = (file) => { try { return localStorage.getItem(key(file)); } catch { return null; } };
const remember = (file, id) => { try { localStorage.setItem(key(file), id); } catch { return; } };
const forget = (file) => { try { localStorage.removeItem(key(file)); } catch { return; } };
const base64 = (text) =>
  btoa(Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join(''));

class Refused extends Error { constructor(status, text) { super(text); this.status = status; } }

const ask = async (method, id, headers = {}, body, signal) => {
  const url = id ? `${ROUTE.origin}${ROUTE.pathname}/${id}` : ROUTE;
  const answer = await fetch(url, { method, body, signal, headers: { 'Tus-Resumable': '1.0.0', ...headers } });
  if (answer.ok) return answer;
  const text = await answer.text();
  let words = text || `The studio answered ${answer.status}.`;
  try { const said = JSON.parse(text); words = `${said.message} ${said.hint}`.trim(); } catch { /* plain text */ }
  throw new Refused(answer.status, words);
};

// ---- what is shown ----

const show = (item) => {
  const share = item.file.size ? Math.floor((item.offset / item.file.size) * 100) : 0;
  item.node.className = `upload ${item.state}`;
  item.bar.firstChild.style.width = `${share}%`;
  item.bar.setAttribute('aria-valuenow', share);
  const done = `${size(item.offset)} of ${size(item.file.size)} (${share} %)`;
  const speed = item.speed ? ` · ${size(item.speed)}/s · ${duration((item.file.size - item.offset) / item.speed)} left` : '';
  item.text.textContent = {
    queued: `${size(item.file.size)} · waits for its turn`, sending: done + speed,
    paused: `${done} · paused`, waiting: `${done} · ${item.note}`, failed: item.note,
    done: `${size(item.file.size)} · arrived`,
  }[item.state];
  item.bar.hidden = item.state === 'done' || item.state === 'failed';
  item.hash.textContent = item.hash.title = item.sha256 ? `sha256 ${item.sha256}` : '';
  const pausable = ['queued', 'sending', 'waiting'].includes(item.state);
  const over = item.state === 'done' || item.final;
  item.pause.hidden = over;
  item.pause.textContent = pausable ? 'Pause' : item.state === 'paused' ? 'Continue' : 'Try again';
  item.pause.setAttribute('aria-label', `${item.pause.textContent} ${item.name}`);
  item.cancel.textContent = over ? 'Hide' : 'Cancel';
  item.cancel.setAttribute('aria-label', `${item.cancel.textContent} ${item.name}`);
  item.cancel.hidden = item.state === 'done' && !item.given;
  reach();
};
// A list that scrolls is a stop of the Tab key, so that the arrow keys scroll it.
const reach = () => { list.tabIndex = list.scrollHeight > list.clientHeight ? 0 : -1; };
// Only the list scrolls, never the page, and not under somebody's fingers.
const follow = (item) => {
  if (list.matches(':hover, :focus-within')) return;
  const top = item.node.offsetTop, bottom = top + item.node.offsetHeight;
  if (top < list.scrollTop || bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
};

const add = (file) => {
  if (items.some((other) => key(other.file) === key(file) && other.state !== 'done')) {
    say(`${plain(file.name)} is in the list already.`);
    return;
  }
  const item = { file, name: plain(file.name), id: null, offset: 0, state: 'queued', note: '', sha256: '', speed: 0, tries: 0, resumed: '',
    piece: FIRST, given: false, final: false, stop: null, wake: null, node: make('li', 'upload') };
  const name = make('b'), row = make('div', 'uploadrow'), buttons = make('span', 'uploadbuttons');
  name.append(make('bdi', '', file.name));
  item.bar = make('div', 'meter'); item.bar.append(make('i'));
  for (const [attribute, value] of [['role', 'progressbar'], ['aria-valuemin', 0], ['aria-valuemax', 100],
    ['aria-label', item.name]]) item.bar.setAttribute(attribute, value);
  item.text = make('span', 'uploadtext'); item.hash = make('code', 'uploadhash');
  item.pause = make('button'); item.cancel = make('button');
  for (const button of [item.pause, item.cancel]) button.type = 'button';
  item.pause.addEventListener('click', () => (['queued', 'sending', 'waiting'].includes(item.state) ? pause(item) : go_on(item)));
  item.cancel.addEventListener('click', () => cancel(item));
  buttons.append(item.pause, item.cancel);
  row.append(item.text, buttons);
  item.node.append(name, item.bar, row, item.hash);
  list.append(item.node);
  items.push(item);
  show(item);
};

// ---- what the user does ----

const take = (files) => {
  if (!files.length) return;
  for (const item of items.filter((each) => each.given || each.final)) remove(item);
  for (const file of files) add(file);
  next();
};
const interrupt = (item, state) => {
  item.state = state; item.speed = 0;
  item.stop?.abort(); item.wake?.();
  show(item);
};
const pause = (item) => { interrupt(item, 'paused'); say(`${item.name} is paused.`); if (current !== item) next(); };
const go_on = (item) => { item.tries = 0; item.state = 'queued'; show(item); next(); };
const remove = (item) => { items.splice(items.indexOf(item), 1); item.node.remove(); reach(); };
const cancel = (item) => {
  const was = item.state;
  interrupt(item, 'cancelled');
  forget(item.file);
  remove(item);
  picker.focus();
  if (was !== 'done') {
    say(item.final ? '' : `${item.name} is cancelled.`);
    // What cannot be deleted now is swept by the studio within the hour.
    if (item.id) ask('DELETE', item.id).catch(() => undefined);
  }
  if (current !== item) next();
};

// ---- sending ----

const next = async () => {
  if (current) return;
  current = items.find((item) => item.state === 'queued') || null;
  if (!current) {
    hand_over();
    const failed = items.find((item) => item.state === 'failed');
    if (failed) follow(failed);
    return;
  }
  const item = current;
  item.state = 'sending';
  show(item);
  follow(item);
  while (item.state === 'sending') {
    try { await send(item); } catch (error) { await mend(item, error); }
  }
  current = null;
  next();
};

const find = async (item) => {
  item.id = item.id || remembered(item.file);
  if (item.id) {
    try {
      const answer = await ask('HEAD', item.id);
      if (Number(answer.headers.get('Upload-Length')) === item.file.size) {
        const before = item.offset;
        item.offset = Number(answer.headers.get('Upload-Offset'));
        item.sha256 = answer.headers.get('Upload-Sha256') || '';
        if (!before && item.offset) {
          item.resumed = ` went on at ${Math.floor((item.offset / item.file.size) * 100)} %`;
          say(`${item.name} has begun already and${item.resumed}.`);
        }
        return;
      }
    } catch (error) {
      if (error.status !== 404) throw error;
      if (item.offset) say(`The studio kept the first part of ${item.name} no longer; it starts again.`);
    }
  }
  item.offset = 0;
  const answer = await ask('POST', null, { 'Upload-Length': String(item.file.size),
    'Upload-Metadata': `filename ${base64(item.file.name)}` });
  item.id = answer.headers.get('Location').split('/').pop();
  remember(item.file, item.id);
};

const send = async (item) => {
  await find(item);
  while (item.state === 'sending' && !item.sha256) {
    show(item);
    const started = performance.now(), from = item.offset;
    item.stop = new AbortController();
    const answer = await ask('PATCH', item.id,
      { 'Upload-Offset': String(from), 'Content-Type': 'application/offset+octet-stream' },
      item.file.slice(from, from + item.piece), item.stop.signal);
    item.offset = Number(answer.headers.get('Upload-Offset'));
    item.sha256 = answer.headers.get('Upload-Sha256') || '';
    item.tries = 0;
    const took = Math.max(performance.now() - started, 1), rate = ((item.offset - from) / took) * 1000;
    item.speed = item.speed ? 0.7 * item.speed + 0.3 * rate : rate;
    item.piece = Math.min(LARGEST, Math.max(SMALLEST, item.piece * Math.min(2, Math.max(0.5, WANTED_MS / took))));
    item.piece = Math.ceil(item.piece / SMALLEST) * SMALLEST;
  }
  if (item.state !== 'sending') return;
  item.state = 'done';
  show(item);
  say(`${item.name}${item.resumed ? `${item.resumed} and` : ''} has arrived.`);
};

const mend = async (item, error) => {
  if (item.state !== 'sending') return;  // paused or cancelled: the abort is ours
  const fail = (words, final) => {
    Object.assign(item, { state: 'failed', note: words, speed: 0, final });
    show(item);
    say(`${item.name}: ${words}`);
  };
  if (error.status && !PASSING.includes(error.status)) { fail(error.message, error.status < 500); return; }
  if (error.status === 404) item.id = null;
  try { await item.file.slice(0, 1).arrayBuffer(); } catch {
    fail('The file was changed, moved or deleted; choose it again.', true);
    forget(item.file);
    return;
  }
  item.tries += 1;
  if (item.tries >= TRIES) { fail(`${error.status ? error.message : 'The studio does not answer.'} What has arrived is kept for an hour.`, false); return; }
  const wait = Math.min(LONGEST_WAIT_MS, 250 * 2 ** item.tries);
  item.state = 'waiting'; item.speed = 0;
  item.note = `${error.status ? error.message : 'the studio does not answer'} Trying again in ${duration(wait / 1000)} (${item.tries} of ${TRIES - 1})`;
  show(item);
  if (item.tries === 2) say(`${item.name}: ${item.note}`);
  await new Promise((resolve) => { item.wake = resolve; setTimeout(resolve, wait); });
  item.wake = null;
  if (item.state === 'waiting') item.state = 'sending';
};

const hand_over = () => {
  const ready = items.filter((item) => item.state === 'done' && !item.given);
  if (!ready.length) return;
  const target = document.querySelector(`#${box.dataset.target} textarea, #${box.dataset.target} input`);
  if (!target) { say('The page has lost a part of itself; reload it and choose the files again.'); return; }
  target.value = JSON.stringify(ready.map((item) => item.id));
  target.dispatchEvent(new Event('input', { bubbles: true }));
  for (const item of ready) { item.given = true; forget(item.file); show(item); }
};

picker.addEventListener('change', () => { take([...picker.files]); picker.value = ''; });
for (const name of ['dragenter', 'dragover']) {
  zone.addEventListener(name, (event) => { event.preventDefault(); zone.classList.add('over'); });
}
zone.addEventListener('dragleave', () => zone.classList.remove('over'));
zone.addEventListener('drop', (event) => {
  event.preventDefault();
  zone.classList.remove('over');
  // A folder arrives as an entry that is no file.
  const kinds = [...event.dataTransfer.items].map((entry) => entry.webkitGetAsEntry?.());
  const files = [...event.dataTransfer.files].filter((_, index) => !kinds[index]?.isDirectory);
  if (files.length < event.dataTransfer.files.length) say('Folders are not taken; zip them, or choose their files.');
  take(files);
});
window.addEventListener('online', () => current?.wake?.());
