// One line chart: draws `props.value` = {points: [[step, value], ...], smooth: bool, digits: n}
// as SVG, again whenever the value or the width changes. No library, nothing is loaded.
const NS = 'http://www.w3.org/2000/svg';
const HEIGHT = 190, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;
const box = element.querySelector('.chart');

const make = (name, attributes, text) => {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

const ticks = (low, high, wanted) => {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(t);
  return found;
};

const label = (value) =>
  value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? value.toExponential(1) : String(Number(value.toPrecision(3)));

// Exponential moving average without the bias of its start (Adam, arXiv 1412.6980, section 3).
const smoothed = (points) => {
  const keep = 0.9; let mean = 0, weight = 0;
  return points.map(([x, y]) => {
    mean = keep * mean + (1 - keep) * y; weight = keep * weight + (1 - keep);
    return [x, mean / weight];
  });
};

const draw = () => {
  const data = props.value || {}, points = data.points || [];
  const root = element.querySelector('.chart');
  const width = root.clientWidth;
  root.replaceChildren();
  if (!points.length) { root.textContent = 'Nothing measured yet.'; return; }
  if (width < 80) return;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const pad = (Math.max(...ys) - Math.min(...ys)) * 0.06 || Math.abs(ys[0]) * 0.1 || 1;
  const y0 = Math.min(...ys) >= 0 ? Math.max(0, Math.min(...ys) - pad) : Math.min(...ys) - pad;
  const y1 = Math.max(...ys) + pad;
  const sx = (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const sy = (y) => TOP + (1 - (y - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = make('svg', { width, height: HEIGHT, role: 'img',
    'aria-label': `${data.name}: ${points.length} points, last ${label(ys[ys.length - 1])}` });
  for (const t of ticks(y0, y1, 5)) {
    svg.append(make('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: sy(t), y2: sy(t) }));
    svg.append(make('text', { class: 'tick', x: LEFT - 8, y: sy(t) + 4, 'text-anchor': 'end' }, label(t)));
  }
  for (const t of ticks(x0, x1, width > 420 ? 7 : 4).filter(Number.isInteger)) {
    svg.append(make('text', { class: 'tick', x: sx(t), y: HEIGHT - 6, 'text-anchor': 'middle' }, t));
  }
  const path = (list) => list.map(([x, y], i) => `${i ? 'L' : 'M'}${sx(x).toFixed(1)},${sy(y).toFixed(1)}`).join('');
  const smooth = data.smooth && points.length > 12;
  svg.append(make('path', { class: smooth ? 'line faint' : 'line', d: path(points) }));
  if (smooth) svg.append(make('path', { class: 'line', d: path(smoothed(points)) }));
  const cursor = make('line', { class: 'cursor', y1: TOP, y2: HEIGHT - BOTTOM, visibility: 'hidden' });
  const dot = make('circle', { class: 'dot', r: 3.5, visibility: 'hidden' });
  if (points.length === 1) { dot.setAttribute('cx', sx(xs[0])); dot.setAttribute('cy', sy(ys[0])); dot.setAttribute('visibility', 'visible'); }
  svg.append(cursor, dot);
  const tip = document.createElement('div');
  tip.className = 'tip';
  root.append(svg, tip);
  svg.addEventListener('pointermove', (event) => {
    const at = x0 + ((event.offsetX - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    for (const end of ['x1', 'x2']) cursor.setAttribute(end, sx(near[0]));
    dot.setAttribute('cx', sx(near[0])); dot.setAttribute('cy', sy(near[1]));
    for (const mark of [cursor, dot]) mark.setAttribute('visibility', 'visible');
    tip.textContent = `step ${near[0]}: ${Number(near[1].toPrecision(5))}`;
    tip.style.opacity = 1;
    tip.style.left = `${Math.min(Math.max(sx(near[0]), 60), width - 70)}px`;
  });
  svg.addEventListener('pointerleave', () => {
    for (const mark of [cursor, dot]) mark.setAttribute('visibility', 'hidden');
    tip.style.opacity = 0;
  });
};

watch('value', draw);
new ResizeObserver(draw).observe(box);
draw();
