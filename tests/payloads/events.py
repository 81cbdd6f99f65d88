"""Sends the same events with each of the Python SDKs for Segment-like events.

usage: python3 events.py segment|customerio, with CAPTURE_URL set
"""

import os
import sys
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from uuid import UUID

if sys.argv[1] == "segment":
    from segment.analytics.client import Client
else:
    from customerio.analytics.client import Client


class Plan(Enum):
    PRO = "pro"


BERLIN = timezone(timedelta(hours=1))

# (method, arguments). The people are fictitious.
EVENTS = [
    ("identify", dict(user_id="user-3001", traits={
        "email": "alma.berg@northwind.example.com",
        "firstName": "Alma",
        "lastName": "Berg",
        "name": "Alma Berg",
        "phone": "+1 206 555 0101",
        "title": "Head of Operations",
        "website": "https://northwind.example.com/team/alma",
        "url": "northwind.example.com",
        "address": {"street": "12 Harbour Rd", "city": "Seattle", "state": "WA", "postalCode": "98101",
                    "country": "US"},
        "company": {"id": "comp-901", "name": "Northwind Traders", "industry": "Logistics",
                    "employee_count": 42, "plan": Plan.PRO},
        "plan": Plan.PRO,
        "createdAt": datetime(2026, 3, 1, 9, 30, 0, 120000, timezone.utc),
        "lastLogin": datetime(2026, 3, 1, 9, 30),
        "birthday": date(1990, 5, 17),
        "seats": 12,
        "score": 0.75,
        "spent": Decimal("1234.50"),
        "credit": 1e22,
        "active": True,
        "newsletter": False,
        "referrer": None,
        "account": UUID(int=7),
        "tags": ["beta", "eu", 7, None],
        "roles": ("owner", "admin"),
    })),
    ("identify", dict(user_id="user-3002")),
    ("identify", dict(anonymous_id="anon-3003", traits={"plan": "free"})),
    ("identify", dict(anonymous_id="anon-3004", traits={"email": "Ben.Okafor@Example.COM ", "firstName": "Ben"})),
    ("identify", dict(user_id="user-3005", traits={
        "email": "carla@fabrikam.test", "name": "Carla Ruiz", "company": "Fabrikam GmbH",
        "website": "fabrikam.test"})),
    ("identify", dict(
        user_id="user-3006", anonymous_id="anon-3006",
        traits={"email": "dev@contoso.test", "name": "Dev Patel", "company": {"id": 77, "name": "Contoso"}},
        context={
            "ip": "203.0.113.9",
            "locale": "en-GB",
            "timezone": "Europe/London",
            "userAgent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0",
            "groupId": "comp-902",
            "page": {"path": "/signup", "referrer": "", "search": "?ref=ad", "title": "Sign up",
                     "url": "https://www.example.com/signup?ref=ad"},
            "campaign": {"name": "autumn", "source": "newsletter"},
            "active": True,
        })),
    ("identify", dict(user_id="user-3007", traits={"email": "eli@example.com"}, integrations={"All": False})),
    ("identify", dict(
        user_id="user-3008", traits={"email": "fay@example.com"},
        integrations={"All": False, "Close": {"status": "Potential"}, "Salesforce": True},
        timestamp=datetime(2026, 11, 20, 10, 15, 30, tzinfo=BERLIN), message_id="import-2026-11-20-0008")),
    # Without a time zone.
    ("identify", dict(user_id="user-3009", traits={"email": "gus@example.com"},
                      timestamp=datetime(2026, 11, 20, 10, 15, 30))),
    ("identify", dict(user_id="user-3010", traits={
        "email": "zoe@example.com", "name": "Zoë 🦊 Ōkami 李", "title": "مديرة",
        "company": {"id": "comp-903", "name": "Ünïcode \u2028& Søns 🚀"}})),
    # A lone surrogate, as JavaScript may write it to JSON.
    ("identify", dict(user_id="user-3011", traits={"email": "hal@example.com", "name": "Hal Winter \ud83c"})),
    ("identify", dict(user_id=3012, traits={"email": "ida@example.com", "company": {"id": None, "name": ""}})),
    ("identify", dict(user_id=None, anonymous_id="anon-3013", traits={"email": None, "name": "Nobody"})),
    # From a numeric column of a data frame: an id as float, and an empty cell as NaN.
    ("identify", dict(user_id=3014.0, traits={"email": "jon@example.com", "company": {"id": 78.0}})),
    ("identify", dict(user_id="user-3015", traits={"email": "kim@example.com", "seats": float("nan")})),
    ("identify", dict(user_id="u", traits={"a": 1})),
    ("track", dict(user_id="user-3001", event="Order Completed", properties={"revenue": 19.9, "currency": "EUR"})),
    ("page", dict(user_id="user-3001", category="Docs", name="Pricing",
                  properties={"url": "https://www.example.com/pricing"})),
    ("screen", dict(anonymous_id="anon-3003", name="Home", properties={"variant": "b"})),
    ("group", dict(user_id="user-3001", group_id="comp-901",
                   traits={"name": "Northwind Traders", "plan": "pro", "employees": 42})),
    ("alias", dict(user_id="user-3003", previous_id="anon-3003")),
]


def failed(error, _):
    print(f"  not sent: {error}")


client = Client("write-key", host=os.environ["CAPTURE_URL"], gzip=True, on_error=failed)
for method, arguments in EVENTS:
    try:
        getattr(client, method)(**arguments)
    except Exception as error:
        print(f"  rejected by the SDK: {method} {arguments.get('user_id')}: {error!r}")
client.shutdown()
