//! The simulator without a server and without a clock, for tests that supply the calls and the time.

use jiff::Timestamp;
use serde_json::Value;

use crate::behaviour::Behaviour;
use crate::call::Call;
use crate::ids::Ids;
use crate::refusal::Object;
use crate::schema::Kind;
use crate::settings::Settings;
use crate::world::{Admission, Decision, World};

/// A simulated organization that is called directly. It is pure: with a fixed [`Settings::seed`], the same
/// settings, calls and times give the same answers, ids included.
///
/// It has no scripted faults. The caller simulates lost requests and lost answers.
#[derive(Debug)]
pub struct Offline {
    world: World,
}

/// The response to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status code.
    pub status: u16,
    /// The headers, mostly those of the rate limits.
    pub headers: Vec<(&'static str, String)>,
    /// The body. It is JSON, except in some errors.
    pub body: String,
}

impl Offline {
    /// An organization with these settings, created at `now`.
    pub fn new(settings: Settings, now: Timestamp) -> Self {
        let ids = Ids::new(settings.seed);
        Self { world: World::new(settings, ids, now) }
    }

    /// Executes a call at `now`. `path` is below `/api/v1/` and may have a query. A body is sent as JSON.
    pub fn ask(
        &mut self,
        key: &str,
        method: &str,
        path: &str,
        body: Option<&Value>,
        now: Timestamp,
    ) -> Reply {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let call = Call {
            method: method.to_owned(),
            path: format!("/{path}"),
            query: Call::parameters(query),
            key: key.to_owned(),
            is_json: body.is_some(),
            is_chunked: false,
            body: Some(body.map(ToString::to_string).unwrap_or_default()),
        };
        let world = &mut self.world;
        let Admission { number, headers, decision } = world.admit(&call, now);
        let answer = match decision {
            Decision::Rejected(answer) => answer,
            Decision::Accepted(_) => world.serve(&call, now),
        };
        world.requests.answered(number, answer.status);
        let answer = answer.with(headers);
        Reply { status: answer.status, headers: answer.headers, body: answer.payload.encode().1 }
    }

    /// Creates a lead as `POST /lead/` does, but visible to search at once.
    ///
    /// # Errors
    /// The body of the 400 response.
    pub fn add_lead(&mut self, body: &Object, now: Timestamp) -> Result<Value, Value> {
        self.world.add_indexed(Kind::Lead, body, now).map_err(|refusal| refusal.body())
    }

    /// Changes the behaviour from the next call on.
    pub fn behave(&mut self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.world.records.schema.behaviour);
    }

    /// Makes everything written so far visible to search.
    pub fn index_now(&mut self) {
        self.world.records.index.apply_all();
    }

    /// All leads with their contacts as they are now, regardless of the search index; oldest first.
    pub fn leads(&self) -> Vec<Value> {
        self.world.records.all(Kind::Lead)
    }

    /// A lead or contact as it is now.
    pub fn record(&self, id: &str) -> Option<Value> {
        let records = &self.world.records;
        records.kind_of(id).and_then(|kind| records.get(kind, id).ok())
    }

    /// All contacts as they are now, oldest first.
    pub fn contacts(&self) -> Vec<Value> {
        self.world.records.all(Kind::Contact)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::Lag;

    #[test]
    fn the_same_calls_at_the_same_times_get_the_same_answers() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let play = || {
            let lag = Lag::Between(Duration::from_secs(1), Duration::from_secs(9));
            let settings =
                Settings { seed: Uuid::nil(), ..Settings::default() }.with(|close| close.search_lag = lag);
            let mut close = Offline::new(settings, start);
            let search = json!({"query": {"type": "object_type", "object_type": "lead"},
                "results_limit": 10, "_fields": {"lead": ["id"]}});
            let found = |close: &mut Offline, seconds| {
                let now = start + Duration::from_secs(seconds);
                close.ask("api_simulator.key", "POST", "data/search/", Some(&search), now)
            };
            let made = close.ask("api_simulator.key", "POST", "lead/", Some(&json!({"name": "Acme"})), start);
            let (soon, late) = (found(&mut close, 1), found(&mut close, 9));
            let wrong = close.ask("another key", "GET", "me/?_fields=id", None, start);
            assert_eq!((close.leads().len(), wrong.status), (1, 401));
            let rows = |reply: &Reply| {
                let page: Value = serde_json::from_str(&reply.body).unwrap();
                page["data"].as_array().unwrap().len()
            };
            assert_eq!((rows(&soon), rows(&late)), (0, 1), "search lags");
            assert!(made.headers.iter().any(|(name, _)| *name == "ratelimit"));
            [made, soon, late, wrong]
        };
        assert_eq!(play(), play());
    }
}
