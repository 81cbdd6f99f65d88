"""Sends with the track client of the package `customerio`. Its bodies are not like those of Segment.

usage: python3 track.py, with CAPTURE_URL set
"""

import os
from datetime import date, datetime, timezone

from customerio import CustomerIO


class Plain(CustomerIO):
    """The SDK uses only HTTPS, but the capture server uses HTTP."""

    def send_request(self, method, url, data):
        return super().send_request(method, url.replace("https://", "http://", 1), data)


host, port = os.environ["CAPTURE_URL"].removeprefix("http://").split(":")
client = Plain("site-id", "api-key", host=host, port=int(port), retries=0)

# The people are fictitious.
client.identify(
    id="user-5001",
    email="alma.berg@northwind.example.com",
    first_name="Alma",
    last_name="Berg",
    name="Alma Berg",
    phone="+1 206 555 0101",
    title="Head of Operations",
    website="https://northwind.example.com/team/alma",
    address={"city": "Seattle", "country": "US"},
    company={"id": "comp-901", "name": "Northwind Traders"},
    plan="pro",
    created_at=1772357400,
    createdAt=datetime(2026, 3, 1, 9, 30, tzinfo=timezone.utc),
    seats=12,
    score=float("nan"),
    active=True,
    referrer=None,
    tags=["beta", "eu"],
)
client.identify(id="user-5002")
client.identify(id="carla@fabrikam.test", company="Fabrikam GmbH")
client.identify(id="user-5003", email="zoe@example.com", name="Zoë 🦊 李", anonymous_id="anon-5003")
client.identify(id=5004, email="ida@example.com")
client.track("user-5001", "Order Completed", {"revenue": 19.9}, id="01KAMZ", timestamp=1795428930)
client.track_anonymous("anon-5003", "Signed Up", {"email": "ben@example.com"})
client.pageview("user-5001", "https://www.example.com/pricing", referrer="")
client.backfill("user-5001", "Trial Started", datetime(2026, 3, 1, 9, 30), plan="pro")
client.add_device("user-5001", "device-1", "ios", last_used=1795428930)
client.merge_customers("id", "user-5001", "email", "alma@example.com")
client.suppress("user-5009")
client.batch([
    {"type": "person", "action": "identify", "identifiers": {"id": "user-5005"},
     "attributes": {"email": "dev@contoso.test", "name": "Dev Patel", "company": {"id": 77, "name": "Contoso"}}},
    {"type": "person", "action": "event", "identifiers": {"id": "user-5005"}, "name": "Order Completed",
     "attributes": {"revenue": 5}},
])
try:
    client.identify(id="user-5006", birthday=date(1990, 5, 17))
except Exception as error:
    print(f"  rejected by the SDK: date: {error!r}")
