// Sends with the track client of customerio-node. Its bodies are not like those of Segment.
// usage: node track.mjs, with CAPTURE_URL set

import { createRequire } from 'node:module';

// The SDK is installed in the current directory.
const load = createRequire(`${process.cwd()}/`);
const { TrackClient } = load('customerio-node');

const client = new TrackClient('site-id', 'api-key', { url: `${process.env.CAPTURE_URL}/api/v1` });

// The people are fictitious.
await client.identify('user-4001', {
  email: 'alma.berg@northwind.example.com',
  first_name: 'Alma',
  last_name: 'Berg',
  name: 'Alma Berg',
  phone: '+1 206 555 0101',
  title: 'Head of Operations',
  website: 'https://northwind.example.com/team/alma',
  address: { city: 'Seattle', country: 'US' },
  company: { id: 'comp-901', name: 'Northwind Traders' },
  plan: 'pro',
  created_at: Math.floor(Date.UTC(2026, 2, 1, 9, 30) / 1000),
  createdAt: new Date(Date.UTC(2026, 2, 1, 9, 30)),
  seats: 12,
  active: true,
  referrer: null,
  tags: ['beta', 'eu'],
});
await client.identify('user-4002');
await client.identify('carla@fabrikam.test', { company: 'Fabrikam GmbH' });
await client.identify('user-4003', { email: 'zoe@example.com', name: 'Zoë 🦊 李', anonymous_id: 'anon-4003' });
await client.identify(4004, { email: 'ida@example.com', id: 4004 });
await client.track('user-4001', { name: 'Order Completed', data: { revenue: 19.9 }, timestamp: 1795428930 });
await client.trackAnonymous('anon-4003', { name: 'Signed Up', data: { email: 'ben@example.com' } });
await client.trackPageView('user-4001', 'https://www.example.com/pricing');
await client.addDevice('user-4001', 'device-1', 'ios', { last_used: 1795428930 });
await client.mergeCustomers('id', 'user-4001', 'email', 'alma@example.com');
await client.suppress('user-4009');
await client.batch([
  {
    type: 'person', action: 'identify', identifiers: { id: 'user-4005' },
    attributes: { email: 'dev@contoso.test', name: 'Dev Patel', company: { id: 77, name: 'Contoso' } },
  },
  { type: 'person', action: 'event', identifiers: { id: 'user-4005' }, name: 'Order Completed', attributes: { revenue: 5 } },
]);
