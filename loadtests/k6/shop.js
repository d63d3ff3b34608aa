// A shop's customers: they sign up and in, browse, search, buy, and think in between.
//
// `make load` runs it: LOAD says how many come when and what they do (loadtests/load/scenarios.py), URL where. Each answer
// is one value of the trend `answered`, with who gave it as tags; the report is made of these.
import http from 'k6/http';
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Trend } from 'k6/metrics';

const load = JSON.parse(__ENV.LOAD);
const api = `${__ENV.URL}/api/v1`;
const words = ['lamp', 'oak', 'linen', 'folding chair', 'teapot', 'notebook', 'garden'];

const answered = new Trend('answered', true);

export const options = {
  scenarios: {
    shop: {
      executor: 'ramping-vus',
      startVUs: 0,
      stages: load.stages.map(([seconds, target]) => ({ duration: `${Math.round(seconds * 1000)}ms`, target })),
      gracefulRampDown: '10s',
      gracefulStop: '10s',
    },
  },
  // What the report reads; the rest would only make the file larger.
  systemTags: ['scenario'],
};

let session; // of this virtual user, signed in once

function part(timing, name) {
  const found = new RegExp(`${name};desc="([^"]*)"`).exec(timing || '');
  return found ? found[1] : '';
}

function noted(answer, kind) {
  const timing = answer.headers['Server-Timing'];
  answered.add(answer.timings.duration, {
    kind,
    answer: String(answer.status),
    cache: part(timing, 'cache'),
    node: part(timing, 'db'),
    instance: answer.headers['X-Instance'] || '',
  });
  return answer;
}

function signIn() {
  const email = `k6-${exec.vu.idInTest}-${Date.now()}@example.com`;
  const json = { headers: { 'Content-Type': 'application/json' } };
  const person = { email, password: load.password, name: 'Load Test' };
  noted(http.post(`${api}/profiles`, JSON.stringify(person), json), 'sign-up');
  const answer = noted(http.post(`${api}/sessions`, JSON.stringify({ email, password: load.password }), json), 'sign-in');
  return answer.status === 201 ? { Authorization: `Bearer ${answer.json('token')}` } : null;
}

function read(path, kind) {
  return noted(http.get(`${api}${path}`, { headers: session }), kind);
}

function pick(items) {
  return items[Math.floor(Math.random() * items.length)];
}

function browse() {
  const page = read('/products?limit=20', 'products');
  if (page.status === 200) read(`/products/${pick(page.json('items')).id}`, 'product');
}

function search() {
  read(`/products/search?q=${encodeURIComponent(pick(words))}`, 'search');
}

function purchase() {
  const page = read('/products?limit=100', 'products');
  if (page.status !== 200) return;
  const body = { items: [{ product_id: pick(page.json('items')).id, quantity: 1 }], payment_method: 'tok_ok' };
  const key = `k6-${exec.vu.idInTest}-${exec.scenario.iterationInTest}-${Date.now()}`;
  const headers = Object.assign({ 'Content-Type': 'application/json', 'Idempotency-Key': key }, session);
  const answer = noted(http.post(`${api}/orders`, JSON.stringify(body), { headers }), 'order');
  if (!check(answer, { 'order accepted': (r) => r.status === 202 })) return;
  for (let tries = 0; tries < 20; tries += 1) {
    sleep(0.5); // people look again
    const order = read(`/orders/${answer.json('id')}`, 'own order');
    if (order.status === 200 && order.json('status') !== 'processing') return;
  }
}

export default function shop() {
  session = session || signIn();
  if (session) {
    const dice = Math.random() * 100;
    if (dice < load.mix.browse) browse();
    else if (dice < load.mix.browse + load.mix.search) search();
    else purchase();
  }
  sleep(1 + Math.random() * 2); // people read
}
