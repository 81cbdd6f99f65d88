// Sends the same events with each of the Node SDKs for Segment-like events.
// usage: node events.mjs segment|customerio|pipelines, with CAPTURE_URL set

import { createRequire } from 'node:module';

// The SDKs are installed in the current directory.
const load = createRequire(`${process.cwd()}/`);

// [method, event]. The people are fictitious.
const events = [
  ['identify', {
    userId: 'user-2001',
    traits: {
      email: 'alma.berg@northwind.example.com',
      firstName: 'Alma',
      lastName: 'Berg',
      name: 'Alma Berg',
      phone: '+1 206 555 0101',
      title: 'Head of Operations',
      website: 'https://northwind.example.com/team/alma',
      url: 'northwind.example.com',
      address: { street: '12 Harbour Rd', city: 'Seattle', state: 'WA', postalCode: '98101', country: 'US' },
      company: { id: 'comp-901', name: 'Northwind Traders', industry: 'Logistics', employee_count: 42, plan: 'pro' },
      plan: 'pro',
      createdAt: new Date(Date.UTC(2026, 2, 1, 9, 30, 0, 120)),
      birthday: '1990-05-17',
      seats: 12,
      score: 0.75,
      ratio: NaN,
      active: true,
      newsletter: false,
      referrer: null,
      forgotten: undefined,
      renewsAt: new Date('soon'),
      tags: ['beta', 'eu', 7, null],
    },
  }],
  ['identify', { userId: 'user-2002' }],
  ['identify', { anonymousId: 'anon-2003', traits: { plan: 'free' } }],
  ['identify', { anonymousId: 'anon-2004', traits: { email: 'Ben.Okafor@Example.COM ', firstName: 'Ben' } }],
  ['identify', {
    userId: 'user-2005',
    traits: { email: 'carla@fabrikam.test', name: 'Carla Ruiz', company: 'Fabrikam GmbH', website: 'fabrikam.test' },
  }],
  ['identify', {
    userId: 'user-2006',
    anonymousId: 'anon-2006',
    traits: { email: 'dev@contoso.test', name: 'Dev Patel', company: { id: 77, name: 'Contoso' } },
    context: {
      ip: '203.0.113.9',
      locale: 'en-GB',
      timezone: 'Europe/London',
      userAgent: 'Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0',
      groupId: 'comp-902',
      page: {
        path: '/signup', referrer: '', search: '?ref=ad', title: 'Sign up', url: 'https://www.example.com/signup?ref=ad',
      },
      campaign: { name: 'autumn', source: 'newsletter' },
      active: true,
    },
  }],
  ['identify', { userId: 'user-2007', traits: { email: 'eli@example.com' }, integrations: { All: false } }],
  ['identify', {
    userId: 'user-2008',
    traits: { email: 'fay@example.com' },
    integrations: { All: false, Close: { status: 'Potential' }, Salesforce: true },
    timestamp: new Date('2026-11-20T10:15:30.000+01:00'),
    messageId: 'import-2026-11-20-0008',
  }],
  // A time as text, with an offset.
  ['identify', { userId: 'user-2009', traits: { email: 'gus@example.com' }, timestamp: '2026-11-20T10:15:30+01:00' }],
  ['identify', {
    userId: 'user-2010',
    traits: { email: 'zoe@example.com', name: 'Zoë 🦊 Ōkami 李', title: 'مديرة', company: { id: 'comp-903', name: 'Ünïcode \u2028& Søns 🚀' } },
  }],
  // `slice(0, 12)` cuts the name in the middle of an emoji.
  ['identify', { userId: 'user-2011', traits: { email: 'hal@example.com', name: 'Hal Winter 🏔️'.slice(0, 12) } }],
  // The types do not allow these, but plain JavaScript does not check types.
  ['identify', { userId: 2012, traits: { email: 'ida@example.com', company: { id: null, name: '' } } }],
  ['identify', { userId: null, anonymousId: 'anon-2013', traits: { email: null, name: 'Nobody' } }],
  ['identify', { userId: 'u', traits: { a: 1 } }],
  ['track', { userId: 'user-2001', event: 'Order Completed', properties: { revenue: 19.9, currency: 'EUR' } }],
  ['page', { userId: 'user-2001', category: 'Docs', name: 'Pricing', properties: { url: 'https://www.example.com/pricing' } }],
  ['screen', { anonymousId: 'anon-2003', name: 'Home', properties: { variant: 'b' } }],
  ['group', { userId: 'user-2001', groupId: 'comp-901', traits: { name: 'Northwind Traders', plan: 'pro', employees: 42 } }],
  ['alias', { userId: 'user-2003', previousId: 'anon-2003' }],
];

// Sends through the queue of the SDK, in one batch if the SDK supports batches.
async function queued(client) {
  client.on('error', (error) => { throw new Error(`${error.code}: ${error.reason}`); });
  for (const [method, event] of events) {
    try {
      client[method](event);
    } catch (error) {
      console.log(`  rejected by the SDK: ${method} ${JSON.stringify(event.userId)}: ${error.message}`);
    }
  }
  await client.closeAndFlush();
}

const host = process.env.CAPTURE_URL;
const senders = {
  async segment() {
    const { Analytics } = load('@segment/analytics-node');
    await queued(new Analytics({ writeKey: 'write-key', host, flushAt: 100 }));
  },
  async customerio() {
    const { Analytics } = load('@customerio/cdp-analytics-node');
    await queued(new Analytics({ writeKey: 'write-key', host, maxEventsInBatch: 100 }));
  },
  // One request per event, and some events again in a batch.
  async pipelines() {
    const { PipelinesClient } = load('customerio-node');
    const client = new PipelinesClient('write-key', { url: `${host}/v1` });
    for (const [method, event] of events) await client[method](event);
    await client.batch(events.filter((_, n) => [0, 4, 14].includes(n)).map(([type, event]) => ({ type, ...event })));
  },
};
await senders[process.argv[2]]();
