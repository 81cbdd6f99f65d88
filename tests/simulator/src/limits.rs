//! Rate limits: token buckets per endpoint group, for each API key and for the whole organization.
//!
//! A pure state machine; the caller passes the time. It follows Close's limiter (close-api.md §2): windows
//! start on whole seconds, and a new window refills the whole bucket.

use std::{collections::HashMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::behaviour::HeaderStyle;

/// A number of requests per window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Requests in one window; 0 refuses everything.
    pub limit: u32,
    /// The length of the window in seconds.
    pub window: u32,
}

impl Rate {
    /// `limit` requests in each `window` seconds.
    pub const fn new(limit: u32, window: u32) -> Self {
        Self { limit, window }
    }
}

/// The rates of the endpoint groups, for one key. Each HTTP method of a group has its own bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Everything under `/lead/`, so also merges.
    pub lead: Rate,
    /// Everything under `/contact/`.
    pub contact: Rate,
    /// Everything under `/data/`: search.
    pub search: Rate,
    /// Each other first path segment.
    pub others: Rate,
    /// The limit of the organization, as a multiple of the limit of one key.
    pub organization_multiple: u32,
}

impl Limits {
    /// The most recently observed limits, with the stricter interpretation for search (close-api.md §2, §12).
    pub const fn documented() -> Self {
        Self {
            lead: Rate::new(240, 8),
            contact: Rate::new(240, 8),
            search: Rate::new(16, 8),
            others: Rate::new(160, 8),
            organization_multiple: 3,
        }
    }

    /// A million requests a second: effectively unlimited. The headers are still sent, because without them a
    /// client would fall back to its own cautious pace.
    pub const fn unlimited() -> Self {
        let rate = Rate::new(1_000_000, 1);
        Self { lead: rate, contact: rate, search: rate, others: rate, organization_multiple: 3 }
    }

    fn of(&self, segment: &str) -> Rate {
        match segment {
            "lead" => self.lead,
            "contact" => self.contact,
            "data" => self.search,
            _ => self.others,
        }
    }
}

/// The requests that share a bucket: those with the same HTTP method and first path segment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    pub(crate) method: String,
    pub(crate) segment: &'static str,
}

impl Group {
    /// The group of a path below `/api/v1`. Unknown paths share one group, which bounds the number of
    /// buckets.
    pub(crate) fn of(method: &str, path: &str) -> Self {
        const KNOWN: [&str; 8] =
            ["lead", "contact", "data", "event", "me", "status", "custom_field", "custom_field_schema"];
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let segment = KNOWN.into_iter().find(|known| *known == first).unwrap_or("unknown");
        Self { method: method.to_owned(), segment }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum BucketOwner {
    Key(String),
    Organization,
}

/// A snapshot of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BucketState {
    pub(crate) limit: u32,
    pub(crate) remaining: u32,
    pub(crate) reset: Duration,
    window: u32,
    organization: bool,
    group: Group,
}

/// Whether a request was allowed, with the state of the bucket that has the fewest tokens left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Allowed(BucketState),
    Refused(BucketState),
}

#[derive(Debug)]
struct Bucket {
    ends: Timestamp,
    spent: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Limiter {
    buckets: HashMap<(BucketOwner, Group), Bucket>,
}

impl Limiter {
    /// Takes a token from the bucket of the key and, if the key is valid, from the bucket of the
    /// organization. Takes none if either bucket is empty.
    pub(crate) fn acquire(
        &mut self,
        limits: &Limits,
        key: &str,
        in_organization: bool,
        group: &Group,
        now: Timestamp,
    ) -> Verdict {
        let rate = limits.of(group.segment);
        let shared = Rate { limit: rate.limit.saturating_mul(limits.organization_multiple), ..rate };
        let mut owners = vec![(BucketOwner::Key(key.to_owned()), rate)];
        if in_organization {
            owners.push((BucketOwner::Organization, shared));
        }
        let empty = owners
            .iter()
            .map(|(owner, rate)| self.state(owner, *rate, group, now))
            .find(|state| state.remaining == 0);
        if let Some(state) = empty {
            return Verdict::Refused(state);
        }
        let mut closest: Option<BucketState> = None;
        for (owner, rate) in owners {
            self.bucket(&owner, rate, group, now).spent += 1;
            let state = self.state(&owner, rate, group, now);
            if closest.as_ref().is_none_or(|closest| state.remaining < closest.remaining) {
                closest = Some(state);
            }
        }
        match closest {
            Some(state) => Verdict::Allowed(state),
            None => Verdict::Refused(BucketState::empty(rate, group)),
        }
    }

    fn state(&mut self, owner: &BucketOwner, rate: Rate, group: &Group, now: Timestamp) -> BucketState {
        let bucket = self.bucket(owner, rate, group, now);
        BucketState {
            remaining: rate.limit.saturating_sub(bucket.spent),
            reset: Duration::try_from(bucket.ends.duration_since(now)).unwrap_or_default(),
            organization: *owner == BucketOwner::Organization,
            ..BucketState::empty(rate, group)
        }
    }

    /// The bucket, renewed if its window has ended.
    fn bucket(&mut self, owner: &BucketOwner, rate: Rate, group: &Group, now: Timestamp) -> &mut Bucket {
        // Invalid keys have buckets too, so their number must be bounded: drop those whose window has ended.
        const MANY: usize = 1_000;
        if self.buckets.len() > MANY {
            self.buckets.retain(|_, bucket| now < bucket.ends);
        }
        let starts = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let window = SignedDuration::from_secs(rate.window.max(1).into());
        let fresh = || Bucket { ends: starts.saturating_add(window).unwrap_or(starts), spent: 0 };
        let bucket = self.buckets.entry((owner.clone(), group.clone())).or_insert_with(fresh);
        if bucket.ends <= now {
            *bucket = fresh();
        }
        bucket
    }
}

impl BucketState {
    fn empty(rate: Rate, group: &Group) -> Self {
        Self {
            limit: rate.limit,
            remaining: 0,
            reset: Duration::from_secs(rate.window.into()),
            window: rate.window,
            organization: false,
            group: group.clone(),
        }
    }

    /// The state with another reset time: of a hidden limit, only the reset is meaningful (close-api.md §2).
    pub(crate) fn with_reset(self, reset: Duration) -> Self {
        Self { reset, ..self }
    }

    /// The rate limit headers.
    pub(crate) fn headers(&self, style: HeaderStyle) -> Vec<(&'static str, String)> {
        let Self { limit, remaining, .. } = self;
        let reset = format!("{:.6}", self.reset.as_secs_f64());
        let legacy = [
            ("x-rate-limit-limit", limit.to_string()),
            ("x-rate-limit-remaining", remaining.to_string()),
            ("x-rate-limit-reset", reset.clone()),
        ];
        let proxy = [
            ("ratelimit-limit", limit.to_string()),
            ("ratelimit-remaining", remaining.to_string()),
            ("ratelimit-reset", self.retry_after()),
        ];
        match style {
            HeaderStyle::Comma => {
                vec![("ratelimit", format!("limit={limit}, remaining={remaining}, reset={reset}"))]
            }
            HeaderStyle::Semicolon => {
                vec![("ratelimit", format!("limit={limit}; remaining={remaining}; reset={reset}"))]
            }
            // The triple describes another bucket.
            HeaderStyle::SemicolonAndTriple => {
                let joint = format!("limit={limit}; remaining={remaining}; reset={reset}");
                let mut headers = vec![("ratelimit", joint)];
                headers.extend(proxy);
                headers[2].1 = remaining.saturating_sub(1).to_string();
                headers
            }
            HeaderStyle::UnreadableAndTriple => {
                let draft = format!("\"default\";r={remaining};t={}", self.retry_after());
                std::iter::once(("ratelimit", draft)).chain(proxy).collect()
            }
            HeaderStyle::Legacy => legacy.into(),
            HeaderStyle::Proxy => legacy.into_iter().chain(proxy).collect(),
            HeaderStyle::Absent => Vec::new(),
        }
    }

    /// `Retry-After`: whole seconds, rounded up (close-api.md §2).
    pub(crate) fn retry_after(&self) -> String {
        let whole = self.reset.as_secs() + u64::from(self.reset.subsec_nanos() > 0);
        whole.to_string()
    }

    /// The body of a 429, with `rate_reset` as a string or as a number (close-api.md §2).
    pub(crate) fn details(&self, reset_as_text: bool) -> Value {
        let reset = self.reset.as_secs_f64();
        let group = format!("{} {}", self.group.method, self.group.segment);
        json!({
            "message": "API call count exceeded for this period",
            "rate_reset": if reset_as_text { json!(format!("{reset:.6}")) } else { json!(reset) },
            "rate_limit": self.limit,
            "rate_window": self.window,
            "rate_limit_type": if self.organization { "organization" } else { "key" },
            "rate_endpoint_group": Uuid::new_v5(&Uuid::NAMESPACE_URL, group.as_bytes()).simple().to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        lead: Rate::new(2, 8),
        contact: Rate::new(2, 8),
        search: Rate::new(1, 1),
        others: Rate::new(0, 8),
        organization_multiple: 2,
    };

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(1_700_000_000_000 + milliseconds).unwrap()
    }

    /// `Ok(remaining)` or `Err(reset in milliseconds)`.
    fn outcome(verdict: Verdict) -> Result<u32, u128> {
        match verdict {
            Verdict::Allowed(state) => Ok(state.remaining),
            Verdict::Refused(state) => Err(state.reset.as_millis()),
        }
    }

    #[test]
    fn a_bucket_empties_and_is_refilled_at_the_end_of_the_window() {
        let mut limiter = Limiter::default();
        let group = Group::of("POST", "/lead/");
        for (now, expected) in [
            (300, Ok(1)),
            (400, Ok(0)),
            (500, Err(7500)), // the window started at the whole second
            (7999, Err(1)),
            (8000, Ok(1)),
            (8000, Ok(0)),
            (20_500, Ok(1)),
        ] {
            let verdict = limiter.acquire(&LIMITS, "key", true, &group, at(now));
            assert_eq!(outcome(verdict), expected, "{now}");
        }
    }

    #[test]
    fn paths_of_a_group_share_a_bucket_and_groups_do_not() {
        let mut limiter = Limiter::default();
        for (method, path, expected) in [
            ("POST", "/lead/", Ok(1)),
            ("PUT", "/lead/lead_1/", Ok(1)),
            ("POST", "/lead/merge/", Ok(0)),
            ("POST", "/lead/", Err(8000)),
            ("POST", "/contact/", Ok(1)),
            ("POST", "/data/search/", Ok(0)),
            ("GET", "/me/", Err(8000)), // a limit of 0 allows nothing
            ("GET", "/nowhere/", Err(8000)),
        ] {
            let verdict = limiter.acquire(&LIMITS, "key", true, &Group::of(method, path), at(0));
            assert_eq!(outcome(verdict), expected, "{method} {path}");
        }
    }

    #[test]
    fn the_organization_has_its_own_bucket() {
        let mut limiter = Limiter::default();
        let group = Group::of("GET", "/lead/");
        for (key, in_organization, expected) in [
            ("a", true, Ok(1)),
            ("a", true, Ok(0)),
            ("a", true, Err(8000)), // takes no token of the organization
            ("wrong", false, Ok(1)),
            ("b", true, Ok(1)),
            ("c", true, Ok(0)), // the organization has fewer tokens left than the key
            ("b", true, Err(8000)),
            ("d", true, Err(8000)),
            ("wrong", false, Ok(0)),
        ] {
            let verdict = limiter.acquire(&LIMITS, key, in_organization, &group, at(0));
            assert_eq!(outcome(verdict), expected, "{key}");
        }
    }

    #[test]
    fn headers_have_every_known_form() {
        let state = BucketState {
            remaining: 3,
            ..BucketState::empty(Rate::new(16, 8), &Group::of("POST", "/data/search/"))
        }
        .with_reset(Duration::from_millis(5_250));
        let lines = |style| {
            let headers = state.headers(style);
            headers.into_iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
        };
        assert_eq!(lines(HeaderStyle::Comma), ["ratelimit: limit=16, remaining=3, reset=5.250000"]);
        assert_eq!(lines(HeaderStyle::Semicolon), ["ratelimit: limit=16; remaining=3; reset=5.250000"]);
        assert_eq!(
            lines(HeaderStyle::SemicolonAndTriple),
            [
                "ratelimit: limit=16; remaining=3; reset=5.250000",
                "ratelimit-limit: 16",
                "ratelimit-remaining: 2",
                "ratelimit-reset: 6"
            ]
        );
        assert_eq!(lines(HeaderStyle::UnreadableAndTriple)[0], "ratelimit: \"default\";r=3;t=6");
        assert_eq!(lines(HeaderStyle::UnreadableAndTriple)[2], "ratelimit-remaining: 3");
        let legacy = ["x-rate-limit-limit: 16", "x-rate-limit-remaining: 3", "x-rate-limit-reset: 5.250000"];
        assert_eq!(lines(HeaderStyle::Legacy), legacy);
        assert_eq!(lines(HeaderStyle::Proxy)[..3], legacy);
        assert_eq!(
            lines(HeaderStyle::Proxy)[3..],
            ["ratelimit-limit: 16", "ratelimit-remaining: 3", "ratelimit-reset: 6"]
        );
        assert!(lines(HeaderStyle::Absent).is_empty());
        assert_eq!(state.retry_after(), "6");
        assert_eq!(state.clone().with_reset(Duration::from_secs(5)).retry_after(), "5");
        assert_eq!(state.details(true)["rate_reset"], json!("5.250000"));
        assert_eq!(state.details(false)["rate_reset"], json!(5.25));
    }
}
