// A shop's customers: they sign up and in, browse, search, buy, and think in between.
//
//   k6 run -e URL=http://127.0.0.1:8000 -e USERS=20 -e DURATION=60s loadtests/k6/shop.js
//
// The mix is 60 % browsing, 25 % searching, 15 % buying. The run fails when a threshold is missed: the objectives of
// the service are p95 under 100 ms and 99.99 % of requests answered.
import http from 'k6/http';
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter, Trend } from 'k6/metrics';

const api = `${__ENV.URL || 'http://127.0.0.1:8000'}/api/v1`;
const users = Number(__ENV.USERS || 20);
const password = 'three calm otters swim';
const words = ['lamp', 'oak', 'linen', 'folding chair', 'teapot', 'notebook', 'garden'];

const placed = new Counter('orders_placed');
const limited = new Counter('rate_limited');
const untilConfirmed = new Trend('order_until_confirmed', true);

export const options = {
  scenarios: {
    shop: { executor: 'constant-vus', vus: users, duration: __ENV.DURATION || '60s', gracefulStop: '10s' },
  },
  thresholds: {
    http_req_failed: ['rate<0.0001'],
    'http_req_duration{kind:read}': ['p(95)<100'],
    'http_req_duration{kind:order}': ['p(95)<200'],
    checks: ['rate>0.999'],
  },
  summaryTrendStats: ['med', 'p(95)', 'p(99)', 'max'],
};

// A 429 is an answer that the limit promises, not a failure; it is counted by itself.
http.setResponseCallback(http.expectedStatuses({ min: 200, max: 399 }, 429));

let session; // of this virtual user, signed in once

function signIn() {
  const email = `k6-${exec.vu.idInTest}-${Date.now()}@example.com`;
  const json = { headers: { 'Content-Type': 'application/json' }, tags: { kind: 'sign-in' } };
  http.post(`${api}/profiles`, JSON.stringify({ email, password, name: 'Load Test' }), json);
  const answer = http.post(`${api}/sessions`, JSON.stringify({ email, password }), json);
  check(answer, { 'signed in': (r) => r.status === 201 });
  return answer.status === 201 ? { Authorization: `Bearer ${answer.json('token')}` } : null;
}

function read(path, name) {
  const answer = http.get(`${api}${path}`, { headers: session, tags: { kind: 'read', name } });
  if (answer.status === 429) limited.add(1);
  else check(answer, { [`${name} answers`]: (r) => r.status === 200 });
  return answer;
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

function buy() {
  const page = read('/products?limit=100', 'products');
  if (page.status !== 200) return;
  const body = {
    items: [{ product_id: pick(page.json('items')).id, quantity: 1 }],
    payment_method: 'tok_ok',
  };
  const key = `k6-${exec.vu.idInTest}-${exec.scenario.iterationInTest}-${Date.now()}`;
  const headers = { ...session, 'Content-Type': 'application/json', 'Idempotency-Key': key };
  const started = Date.now();
  const answer = http.post(`${api}/orders`, JSON.stringify(body), { headers, tags: { kind: 'order', name: 'order' } });
  if (answer.status === 429) return void limited.add(1);
  if (!check(answer, { 'order accepted': (r) => r.status === 202 })) return;
  placed.add(1);
  for (let tries = 0; tries < 20; tries += 1) {
    sleep(0.5);
    const order = read(`/orders/${answer.json('id')}`, 'own order');
    if (order.status === 200 && order.json('status') !== 'processing') {
      if (order.json('status') === 'confirmed') untilConfirmed.add(Date.now() - started);
      return;
    }
  }
}

export default function shop() {
  session = session || signIn();
  if (session) {
    const dice = Math.random();
    if (dice < 0.6) browse();
    else if (dice < 0.85) search();
    else buy();
  }
  sleep(1 + Math.random() * 2); // people read
}
