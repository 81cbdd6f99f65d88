//! A stateful fake of the Close REST API over real HTTP, for tests and for trying close-sync without a Close
//! account.
//!
//! It stores leads and contacts and has the properties that make Close hard to write to: rate limits, a search
//! index that lags, typed custom fields, rewritten phone numbers, nested error bodies, lost responses. Its
//! behaviour follows close-api.md. Where Close's behaviour is not documented, the simulator takes the stricter
//! interpretation, so that a client that works here also works with Close. Each such choice is a field of
//! [`Behaviour`], whose default is what was recorded last.
//!
//! It deliberately does not support: OAuth, Smart Fields, saved searches, tasks, opportunities, activities, webhooks,
//! bulk actions, and merges of fields. It refuses such requests.
//!
//! The worker must not depend on it: it only sees a URL. Tests that supply their own time use [`Offline`],
//! without HTTP.
//!
//! Layout, from the network inwards:
//!
//! - `server` and `connection` are HTTP and TCP; `control` is `/_sim/`; `offline` is the entry without HTTP.
//! - `world` answers a `call`, after `limits` and `faults`.
//! - `records` holds the current state; `index` and `events` show it to clients later.
//! - `validate`, `custom` and `formats` check writes; `refusal` has the errors, `forms` their other forms.
//! - `query`, `search` and `lists` read; `readback` rewrites values in answers.
//!
//! From `world` on there is no IO and no clock.

mod behaviour;
mod call;
mod connection;
mod control;
mod custom;
mod events;
mod faults;
mod formats;
mod forms;
mod ids;
mod index;
mod limits;
mod lists;
mod offline;
mod omissions;
mod query;
mod readback;
mod records;
mod refusal;
mod schema;
mod search;
mod server;
mod settings;
mod shared;
#[cfg(test)]
mod tests;
mod validate;
mod world;

use std::{fmt::Write as _, io, net::SocketAddr, sync::Arc};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    behaviour::{
        Behaviour, ContactLists, Country, CreatedLead, DescendingCursor, ErrorShape, ErrorTexts, EventData,
        ExactValue, HeaderStyle, Knob, Lag, LastCursor, LeadContacts, MissingRecord, MissingSlash,
        RateLimitBody, SearchRows, UnknownSelector, UnknownUrl,
    },
    call::Request,
    faults::{Effect, Fault, FaultBody, When},
    limits::{Limits, Rate},
    offline::{Offline, Reply},
    readback::{ListForm, NumberForm, TimeForm, UserForm},
    schema::{CustomField, FieldKind, Owner, UnknownName, User},
    settings::Settings,
};
use self::{
    connection::{ConnectionCutter, CuttableListener},
    ids::Ids,
    schema::Kind,
    shared::Shared,
    world::World,
};

/// A running simulator. Clones are handles to the same simulator, which stops when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Simulator {
    shared: Arc<Shared>,
    running: Arc<Running>,
    addr: SocketAddr,
}

#[derive(Debug)]
struct Running {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Simulator {
    /// Binds the address and serves in the background. Port 0 picks a free port.
    pub async fn start(settings: Settings, addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        let ids = Ids::new(settings.seed);
        let world = World::new(settings, ids, Timestamp::now());
        let shared = Arc::new(Shared::new(world));
        let running = Running { stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let stop = running.stop.clone();
        let listener = CuttableListener { listener, stop: stop.clone() };
        let service =
            server::router(Arc::clone(&shared)).into_make_service_with_connect_info::<ConnectionCutter>();
        running.tasks.spawn(async move {
            // It never fails, and ends only when `stop` is cancelled.
            let _ = axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await;
        });
        running.tasks.close();
        Ok(Self { shared, running: Arc::new(running), addr })
    }

    /// The base URL of the API, such as `http://127.0.0.1:8080/api/v1/`.
    pub fn url(&self) -> String {
        format!("http://{}/api/v1/", self.addr)
    }

    /// The listening address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Closes the listener and cuts all connections, also those that wait for a response. This handle can
    /// still read the state.
    pub async fn stop(&self) {
        self.running.stop.cancel();
        self.running.tasks.wait().await;
    }

    /// All leads with their contacts as they are now, regardless of the search index; oldest first.
    pub fn leads(&self) -> Vec<Value> {
        self.shared.world().records.all(Kind::Lead)
    }

    /// All contacts as they are now, oldest first.
    pub fn contacts(&self) -> Vec<Value> {
        self.shared.world().records.all(Kind::Contact)
    }

    /// The ids and labels of the lead statuses, in the order of the organization.
    pub fn lead_statuses(&self) -> Vec<(String, String)> {
        let world = self.shared.world();
        world.records.schema.statuses.iter().map(|status| (status.id.clone(), status.label.clone())).collect()
    }

    /// The custom fields, in order of creation.
    pub fn fields(&self) -> Vec<CustomField> {
        self.shared.world().records.schema.fields.clone()
    }

    /// Creates a lead as `POST /lead/` does, but visible to search at once. The error is the body of the 400.
    pub fn add_lead(&self, body: Value) -> Result<Value, Value> {
        self.add(Kind::Lead, body)
    }

    /// Creates a contact as `POST /contact/` does, but visible to search at once.
    pub fn add_contact(&self, body: Value) -> Result<Value, Value> {
        self.add(Kind::Contact, body)
    }

    /// Creates a lead as if at this time, for what an organization has from before.
    pub fn add_lead_at(&self, body: Value, at: Timestamp) -> Result<Value, Value> {
        self.add_at(Kind::Lead, body, at)
    }

    fn add(&self, kind: Kind, body: Value) -> Result<Value, Value> {
        self.add_at(kind, body, Timestamp::now())
    }

    fn add_at(&self, kind: Kind, body: Value, at: Timestamp) -> Result<Value, Value> {
        let Value::Object(body) = body else {
            return Err(json!({"error": "JSON data must be a dict."}));
        };
        let record = self.shared.world().add_indexed(kind, &body, at);
        record.map_err(|refusal| refusal.body())
    }

    /// Deletes a lead with its contacts, or a contact, as another user of Close would. Search still shows it
    /// for a while. Returns whether it existed.
    pub fn delete(&self, id: &str) -> bool {
        self.shared.world().delete_any(id, Timestamp::now())
    }

    /// Merges two leads, as another user of Close would.
    pub fn merge(&self, source: &str, destination: &str) -> Result<(), Value> {
        let merged = self.shared.world().records.merge(source, destination, Timestamp::now());
        merged.map_err(|refusal| refusal.body())
    }

    /// Adds a custom field. Refuses a field whose id or name is taken, or whose choices or
    /// `accepts_multiple_values` do not fit its type. The error is the body of the 400.
    pub fn add_field(&self, field: CustomField) -> Result<(), Value> {
        self.shared.world().records.add_field(field).map_err(|refusal| refusal.body())
    }

    /// Replaces the custom field with the same id: its name, type, choices or owner. Values that are no longer
    /// valid are deleted. Refuses what `add_field` refuses, and an unknown id.
    pub fn change_field(&self, field: CustomField) -> Result<(), Value> {
        let changed = self.shared.world().records.change_field(field, Timestamp::now());
        changed.map_err(|refusal| refusal.body())
    }

    /// Deletes a custom field and its values. Returns whether the field existed.
    pub fn remove_field(&self, id: &str) -> bool {
        self.shared.world().records.remove_field(id, Timestamp::now())
    }

    /// Makes everything written so far visible to search.
    pub fn index_now(&self) {
        self.shared.world().records.index.apply_all();
    }

    /// Adds a scripted fault. An invalid status, such as 99, is sent as a 500.
    pub fn fault(&self, fault: Fault) {
        self.shared.world().faults.add(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.shared.world().faults.clear();
    }

    /// The last 100 000 requests to the API, including refused ones; oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.world().requests.all().cloned().collect()
    }

    /// The number of those requests with this method and path prefix (below `/api/v1`).
    pub fn request_count(&self, method: &str, path_prefix: &str) -> usize {
        call::count(self.shared.world().requests.all(), method, path_prefix)
    }

    /// Revokes the API key and accepts this one instead.
    pub fn set_api_key(&self, key: &str) {
        key.clone_into(&mut self.shared.world().api_key);
    }

    /// Changes the search lag for future writes.
    pub fn set_search_lag(&self, lag: Lag) {
        self.behave(|behaviour| behaviour.search_lag = lag);
    }

    /// Changes the behaviour from the next request on.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.world().records.schema.behaviour);
    }

    /// Changes the rate limits from the next request on.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.world().limits = limits;
    }

    /// The usage text that `close-sync simulate` prints.
    pub fn usage(&self) -> String {
        let world = self.shared.world();
        let url = self.url();
        let controls = format!("http://{}/_sim", self.addr);
        let fields = &world.records.schema.fields;
        let mut text = format!("Simulated Close API at {url}\n\nCustom fields:\n");
        for field in fields {
            let owner = match field.owner {
                Owner::Lead => "lead",
                Owner::Contact => "contact",
                Owner::Shared => "shared",
            };
            let kind = json!(field.kind);
            let kind = kind.as_str().unwrap_or_default();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {owner:<8} {kind:<9} {:<20} {}", field.id, field.name);
        }
        text.push_str("\nUsers:\n");
        for user in world.records.schema.users() {
            let _ = writeln!(text, "  {:<20} {}", user.id, user.name());
        }
        text.push_str("\nLead statuses:\n");
        for status in &world.records.schema.statuses {
            let _ = writeln!(text, "  {:<20} {}", status.id, status.label);
        }
        let text_field = |owner: Owner| {
            let mut texts =
                fields.iter().filter(|field| field.owner == owner && field.kind == FieldKind::Text);
            texts.next().map_or("", |field| field.id.as_str())
        };
        let _ = write!(
            text,
            "\nPoint the worker at it:\n\
             \x20 export CLOSE_API_URL={url}\n\
             \x20 export CLOSE_API_KEY={key}\n\
             \x20 export CLOSE_LEAD_COMPANY_ID_FIELD={lead}\n\
             \x20 export CLOSE_CONTACT_USER_ID_FIELD={contact}\n\
             \x20 export CLOSE_SEARCH_LAG={lag}s          # how long a search may lag\n\
             \nInspect it:\n\
             \x20 curl {controls}/\n\
             \x20 curl {controls}/leads\n\
             \nInject faults:\n\
             \x20 # the next three requests to create a lead fail with a 503\n\
             \x20 curl {controls}/faults -d '{{\"method\": \"POST\", \"path\": \"/lead/\", \"times\": 3, \
             \"effect\": {{\"status\": {{\"code\": 503}}}}}}'\n\
             \x20 # one lead is created, but the response is lost\n\
             \x20 curl {controls}/faults -d '{{\"method\": \"POST\", \"path\": \"/lead/\", \"times\": 1, \
             \"effect\": {{\"drop_connection\": {{\"when\": \"after_commit\"}}}}}}'\n\
             \x20 # a proxy answers the next two requests with an HTML page\n\
             \x20 curl {controls}/faults -d '{{\"times\": 2, \"effect\": {{\"status\": {{\"code\": 502, \
             \"body\": \"html\"}}}}}}'\n\
             \x20 # the next request gets no answer for 60 seconds\n\
             \x20 curl {controls}/faults -d '{{\"times\": 1, \"effect\": {{\"timeout\": {{\"ms\": 60000}}}}}}'\n\
             \x20 # a person renames a lead right before the worker changes it; its id is in {controls}/leads\n\
             \x20 curl {controls}/faults -d '{{\"method\": \"PUT\", \"path\": \"/lead/lead_ID/\", \"times\": 1, \
             \"effect\": {{\"edit\": {{\"method\": \"PUT\", \"path\": \"/lead/lead_ID/\", \"body\": {{\"name\": \
             \"Edited\"}}}}}}}}'\n\
             \x20 # a custom field is added, then deleted\n\
             \x20 curl {controls}/fields -d '{{\"id\": \"cf_region\", \"name\": \"Region\", \
             \"type\": \"text\", \"owner\": \"lead\"}}'\n\
             \x20 curl -X DELETE {controls}/fields/cf_region\n\
             \x20 # search lags; the API key is revoked; all faults are removed\n\
             \x20 curl -X PUT {controls}/settings -d '{{\"search_lag\": \"1s..10s\"}}'\n\
             \x20 curl -X PUT {controls}/settings -d '{{\"api_key\": \"another\"}}'\n\
             \x20 curl -X DELETE {controls}/faults\n",
            key = world.api_key,
            // One second more, for the duration of the call.
            lag = world.records.schema.behaviour.search_lag.longest().as_secs() + 1,
            lead = text_field(Owner::Lead),
            contact = text_field(Owner::Contact),
        );
        text
    }
}
