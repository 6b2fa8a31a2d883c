'use strict';
(() => {
  const data = JSON.parse(document.getElementById('samples-data').textContent);
  const byId = (id) => document.getElementById(id);
  const MOST_IN_LIST = 300, MOST_WORDS = 700;
  const SETS = {heldout: 'held-out prompts', training: 'training prompts'};
  const state = {set: data.heldout.items.length ? 'heldout' : 'training', kind: 'all', id: null};

  // Text from models and data is only ever set as textContent.
  function make(tag, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  // The longest common subsequence of words; returns [kind, text] with kind same, new or gone.
  function difference(from, to) {
    const a = from.split(/(\s+)/), b = to.split(/(\s+)/);
    let begin = 0, end = 0;
    while (begin < a.length && begin < b.length && a[begin] === b[begin]) begin++;
    while (end < a.length - begin && end < b.length - begin
           && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
    const x = a.slice(begin, a.length - end), y = b.slice(begin, b.length - end);
    const parts = [['same', a.slice(0, begin).join('')]];
    if (x.length > MOST_WORDS || y.length > MOST_WORDS) {
      parts.push(['gone', x.join('')], ['new', y.join('')]);
    } else {
      const width = y.length + 1, length = new Uint16Array((x.length + 1) * width);
      for (let i = x.length - 1; i >= 0; i--) {
        for (let j = y.length - 1; j >= 0; j--) {
          length[i * width + j] = x[i] === y[j] ? length[(i + 1) * width + j + 1] + 1
            : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
        }
      }
      let i = 0, j = 0;
      while (i < x.length || j < y.length) {
        if (i < x.length && j < y.length && x[i] === y[j]) {
          parts.push(['same', x[i]]); i++; j++;
        } else if (j >= y.length
                   || (i < x.length && length[(i + 1) * width + j] >= length[i * width + j + 1])) {
          parts.push(['gone', x[i]]); i++;
        } else {
          parts.push(['new', y[j]]); j++;
        }
      }
    }
    parts.push(['same', a.slice(a.length - end).join('')]);
    return parts;
  }

  function textOf(text, from) {
    const shown = make('p', undefined, 'text');
    if (from === undefined) {
      shown.textContent = text;
      return shown;
    }
    for (const [kind, part] of difference(from, text)) {
      if (!part) continue;
      if (kind === 'same') shown.append(part);
      else shown.append(make(kind === 'new' ? 'ins' : 'del', part));
    }
    return shown;
  }

  function marks(item) {
    return item.answers.map((a) => !a || a.right === undefined ? '' : a.right ? '✓' : '✗').join('');
  }

  function change(item) {
    const texts = item.answers.filter((a) => a && a.text !== undefined).map((a) => a.text.length);
    return texts.length ? Math.abs(texts[texts.length - 1] - texts[0]) : 0;
  }

  function matching() {
    const query = byId('query').value.toLowerCase();
    let items = data[state.set].items;
    if (state.kind === 'longest change') items = [...items].sort((a, b) => change(b) - change(a));
    else if (state.kind !== 'all') items = items.filter((i) => i.kinds.includes(data.kinds.indexOf(state.kind)));
    if (query) {
      items = items.filter((item) => [item.id, item.prompt, item.target,
        ...item.answers.map((a) => (a && a.text) || '')]
        .some((text) => text.toLowerCase().includes(query)));
    }
    return items;
  }

  function showList() {
    const set = data[state.set], items = matching(), list = byId('list');
    list.replaceChildren();
    for (const item of items.slice(0, MOST_IN_LIST)) {
      const button = make('button');
      button.type = 'button';
      button.append(make('span', marks(item), 'marks'));
      button.append(item.prompt.replace(/\s+/g, ' ').slice(0, 160));
      button.dataset.id = item.id;
      button.setAttribute('aria-current', String(item.id === state.id));
      button.addEventListener('click', () => open(item.id));
      const line = make('li');
      line.append(button);
      list.append(line);
    }
    const of = state.kind in set.of_kind ? set.of_kind[state.kind] : set.looked_at;
    let text = `${items.length.toLocaleString('en')} of ${of.toLocaleString('en')} shown`;
    if (items.length > MOST_IN_LIST) text += `, the first ${MOST_IN_LIST} in the list`;
    if (set.looked_at < set.total) {
      text += `; the first ${set.looked_at.toLocaleString('en')} of `
        + `${set.total.toLocaleString('en')} prompts were looked at`;
    }
    byId('count').textContent = text;
  }

  function showItem() {
    const set = data[state.set], item = set.items.find((i) => i.id === state.id);
    const article = byId('item'), against = byId('against').value;
    article.replaceChildren();
    if (!item) return;
    article.append(make('h3', item.id), make('h4', 'prompt'), textOf(item.prompt),
      make('h4', 'target'), textOf(item.target), make('h4', 'responses'));
    const answers = make('div', undefined, 'answers');
    let before;
    item.answers.forEach((answer, k) => {
      if (!answer) return;
      const box = make('div', undefined, 'answer'), title = make('h4', `${set.systems[k]} `);
      if (answer.right !== undefined) {
        title.append(make('span', answer.right ? '✓ right' : '✗ wrong',
          answer.right ? 'right' : 'wrong'));
      }
      box.append(title);
      if (answer.text !== undefined) {
        const from = against === 'target' ? item.target : against === 'before' ? before : undefined;
        box.append(textOf(answer.text, from));
        before = answer.text;
      }
      const facts = [];
      if (answer.chosen) facts.push(answer.chosen);
      if (answer.truncated) facts.push('truncated at the length limit');
      if (answer.logps) {
        facts.push(`log π(target) ${answer.logps[0]}`, `log π(θ_0's answer) ${answer.logps[1]}`);
      }
      box.append(make('p', facts.join(' · '), 'facts'));
      answers.append(box);
    });
    article.append(answers);
  }

  function setKinds() {
    const kinds = ['all', ...data.kinds.filter((k) => data[state.set].of_kind[k]),
      'longest change'];
    if (!kinds.includes(state.kind)) state.kind = 'all';
    byId('kind').replaceChildren(...kinds.map((kind) => {
      const count = data[state.set].of_kind[kind];
      const option = make('option', count === undefined ? kind : `${kind} (${count})`);
      option.value = kind;
      return option;
    }));
    byId('kind').value = state.kind;
    byId('set').value = state.set;
  }

  function open(id) {
    state.id = id;
    const parts = ['samples', state.set, state.kind, ...(id === null ? [] : [id])];
    history.replaceState(null, '', '#' + parts.map(encodeURIComponent).join('/'));
    for (const button of byId('list').querySelectorAll('button')) {
      const isOpen = button.dataset.id === id;
      button.setAttribute('aria-current', String(isOpen));
      if (isOpen) button.scrollIntoView({block: 'nearest'});
    }
    showItem();
  }

  function show() {
    setKinds();
    showList();
    const items = matching();
    open(items.some((i) => i.id === state.id) ? state.id : items.length ? items[0].id : null);
  }

  function follow() {
    let parts;
    try {
      parts = location.hash.slice(1).split('/').map(decodeURIComponent);
    } catch {
      return false;
    }
    if (parts[0] !== 'samples' || !(parts[1] in SETS)) return false;
    [, state.set, state.kind] = parts;
    state.id = parts.length > 3 ? parts.slice(3).join('/') : null;
    return true;
  }

  function step(by) {
    const items = matching().slice(0, MOST_IN_LIST);
    const at = items.findIndex((i) => i.id === state.id);
    const next = items[Math.min(items.length - 1, Math.max(0, at + by))];
    if (next) open(next.id);
  }

  for (const button of document.querySelectorAll('.copy')) {
    button.hidden = !navigator.clipboard;
    button.addEventListener('click', () => {
      navigator.clipboard.writeText(byId(button.dataset.of).textContent)
        .then(() => { button.textContent = 'copied'; }, () => { button.textContent = 'failed'; });
    });
  }
  if (!data.heldout.items.length && !data.training.items.length) {
    byId('browser').replaceChildren(make('p', 'There are no responses yet.'));
    byId('browser').hidden = false;
    return;
  }
  for (const [set, name] of Object.entries(SETS)) {
    if (!data[set].items.length) continue;
    const option = make('option', name);
    option.value = set;
    byId('set').append(option);
  }
  byId('browser').hidden = false;
  document.querySelector('.controls').addEventListener('submit', (event) => event.preventDefault());
  byId('set').addEventListener('change', (e) => { state.set = e.target.value; show(); });
  byId('kind').addEventListener('change', (e) => { state.kind = e.target.value; show(); });
  byId('query').addEventListener('input', show);
  byId('against').addEventListener('change', showItem);
  window.addEventListener('hashchange', () => { if (follow()) show(); });
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const steps = {j: 1, k: -1};
    const inBrowser = byId('browser').contains(document.activeElement);
    if (inBrowser) Object.assign(steps, {ArrowDown: 1, ArrowUp: -1});
    if (event.key in steps) { event.preventDefault(); step(steps[event.key]); }
    if (event.key === '/') { event.preventDefault(); byId('query').focus(); }
  });
  const isDeep = follow();
  const atStart = location.hash;
  show();
  if (isDeep) byId('samples').scrollIntoView();
  else history.replaceState(null, '', atStart || location.pathname + location.search);
})();
