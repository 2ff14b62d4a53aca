// Tokens are picked by a click on them or on their place in the curve, and by keys; the server tells what is to be told.
// The listeners are on the frame around the view, which stays when the view is drawn anew.
const tokens = () => [...element.querySelectorAll('.tok')];
const KEYS = ['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', 'Home', 'End', 'Enter', ' '];
let waiting;

function pick(index, wait) {
  const all = tokens();
  if (!all.length) return;
  index = Math.min(Math.max(index, 0), all.length - 1);
  element.querySelector('.tok[aria-selected="true"]')?.setAttribute('aria-selected', 'false');
  all[index].setAttribute('aria-selected', 'true');
  all[index].scrollIntoView({ block: 'nearest' });
  element.querySelector('.tokens').setAttribute('aria-activedescendant', all[index].id);
  const cursor = element.querySelector('.cursor');
  cursor?.setAttribute('x1', index + 0.5);
  cursor?.setAttribute('x2', index + 0.5);
  const frame = element.querySelector('.scroll');
  if (frame) frame.scrollLeft = ((index + 0.5) / all.length) * frame.scrollWidth - frame.clientWidth / 2;
  clearTimeout(waiting);
  waiting = setTimeout(() => trigger('select', { index }), wait);
}

// The token nearest in the next line of the text, or in the one before.
function across(all, at, way) {
  const box = all[at].getBoundingClientRect();
  let best = at, line = null, gap = Infinity;
  for (let i = at + way; all[i]; i += way) {
    const other = all[i].getBoundingClientRect();
    if (way * (other.top - box.top) < box.height / 2) continue;
    line ??= other.top;
    if (Math.abs(other.top - line) > box.height / 2) break;
    if (Math.abs(other.left - box.left) < gap) [best, gap] = [i, Math.abs(other.left - box.left)];
  }
  return best;
}

element.addEventListener('click', (event) => {
  const token = event.target.closest('.tok'), curve = event.target.closest('.curve svg');
  if (token) {
    element.querySelector('.tokens').focus({ preventScroll: true });
    pick(tokens().indexOf(token), 0);
  } else if (curve) {
    const box = curve.getBoundingClientRect();
    pick(Math.floor(((event.clientX - box.left) / box.width) * tokens().length), 0);
  }
});

element.addEventListener('keydown', (event) => {
  if (!event.target.closest('.tokens') || !KEYS.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const all = tokens(), at = all.findIndex((token) => token.getAttribute('aria-selected') === 'true');
  if (at < 0) return pick(event.key === 'End' ? all.length - 1 : 0, 0);
  const next = {
    ArrowLeft: () => at - 1,
    ArrowRight: () => at + 1,
    ArrowUp: () => across(all, at, -1),
    ArrowDown: () => across(all, at, 1),
    Home: () => 0,
    End: () => all.length - 1,
  }[event.key];
  pick(next ? next() : at, next ? 120 : 0); // a held key asks once, when it is let go
});
