//! A stateful fake of the Close REST API, served over real HTTP: for tests, and for first steps without an
//! account.
//!
//! It keeps leads and contacts and obeys the rules that make Close hard to write to: rate windows, a search
//! index that lags, typed custom fields, rewritten phone numbers, nested error bodies, answers that get lost.
//! Its facts are those of close-api.md. Where the real API is unknown it takes the harsher reading, so that a
//! client which gets along here gets along there; each such choice is a knob in [`Settings`].
//!
//! It deliberately does not know: OAuth, the legacy `query` parameter, Smart Fields, saved searches, tasks,
//! opportunities, activities, webhooks, bulk actions, `X-HTTP-Method-Override`, and merges of fields. What it
//! does not know it refuses, rather than pretending.
//!
//! Nothing in the worker may know that it exists: it is reached by its URL and in no other way. Tests that
//! bring their own time ask it as [`Offline`], without HTTP.
//!
//! Layout, from the wire inwards: `server` and `connection` are HTTP and TCP; `control` is `/_sim/`;
//! `offline` is the way in without a wire; `world` answers calls; `book` keeps the records, `index` and `events` what others see of them and when;
//! `validate`, `custom` and `formats` check what is written; `query` and `search` read. From `world` on
//! nothing does IO or looks at a clock.

mod call;
mod connection;
mod control;
mod custom;
mod events;
mod faults;
mod formats;
mod ids;
mod index;
mod limits;
mod offline;
mod query;
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
    call::Request,
    faults::{Effect, Fault, FaultBody, When},
    limits::{Limits, Rate},
    offline::{Offline, Reply},
    schema::{CustomField, FieldKind, Owner, User},
    settings::{Country, CreatedLead, ExactValue, HeaderStyle, Lag, MissingSlash, RateLimitBody, Settings},
};
use self::{
    connection::{ConnectionCutter, CuttableListener},
    ids::Ids,
    schema::Kind,
    shared::Shared,
    world::World,
};

/// A running simulator. Clones are handles on the same one; it stops when the last is dropped.
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
    /// Binds the address and serves in the background. Port 0 takes any free port.
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
            // It ends without an error, and only when told to.
            let _ = axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await;
        });
        running.tasks.close();
        Ok(Self { shared, running: Arc::new(running), addr })
    }

    /// The base URL of the API, such as `http://127.0.0.1:8080/api/v1/`.
    pub fn url(&self) -> String {
        format!("http://{}/api/v1/", self.addr)
    }

    /// The address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Closes the listener and cuts every connection, answered or not. What was written stays readable
    /// through this handle.
    pub async fn stop(&self) {
        self.running.stop.cancel();
        self.running.tasks.wait().await;
    }

    /// All leads with their contacts as they are now, whatever search shows; oldest first.
    pub fn leads(&self) -> Vec<Value> {
        self.shared.world().records.all(Kind::Lead)
    }

    /// All contacts as they are now, oldest first.
    pub fn contacts(&self) -> Vec<Value> {
        self.shared.world().records.all(Kind::Contact)
    }

    /// The ids and labels of the lead statuses, in the organisation's own order.
    pub fn lead_statuses(&self) -> Vec<(String, String)> {
        let world = self.shared.world();
        world.records.schema.statuses.iter().map(|status| (status.id.clone(), status.label.clone())).collect()
    }

    /// The custom fields there are, in the order they came.
    pub fn fields(&self) -> Vec<CustomField> {
        self.shared.world().records.schema.fields.clone()
    }

    /// Makes a lead as `POST /lead/` would, visible to search at once. The error is the body of the 400.
    pub fn add_lead(&self, body: Value) -> Result<Value, Value> {
        self.add(Kind::Lead, body)
    }

    /// Makes a contact as `POST /contact/` would, visible to search at once.
    pub fn add_contact(&self, body: Value) -> Result<Value, Value> {
        self.add(Kind::Contact, body)
    }

    fn add(&self, kind: Kind, body: Value) -> Result<Value, Value> {
        let Value::Object(body) = body else {
            return Err(json!({"error": "JSON data must be a dict."}));
        };
        let made = self.shared.world().add_indexed(kind, &body, Timestamp::now());
        made.map_err(|refusal| refusal.body())
    }

    /// Deletes a lead with its contacts, or a contact, as somebody else would: search shows it for a while.
    /// Whether there was one.
    pub fn delete(&self, id: &str) -> bool {
        self.shared.world().delete_any(id, Timestamp::now())
    }

    /// Merges two leads, as somebody else would.
    pub fn merge(&self, source: &str, destination: &str) -> Result<(), Value> {
        let merged = self.shared.world().records.merge(source, destination, Timestamp::now());
        merged.map_err(|refusal| refusal.body())
    }

    /// Adds a custom field. It is refused if its id or name is taken, or if its choices or its multiplicity
    /// do not suit its type. The error is the body of the 400.
    pub fn add_field(&self, field: CustomField) -> Result<(), Value> {
        self.shared.world().records.add_field(field).map_err(|refusal| refusal.body())
    }

    /// Replaces the custom field of the same id: its name, type, choices or owner. Values that the field
    /// does not take any more are lost. It is refused as a new one would be, and if there is no such field.
    pub fn change_field(&self, field: CustomField) -> Result<(), Value> {
        let changed = self.shared.world().records.change_field(field, Timestamp::now());
        changed.map_err(|refusal| refusal.body())
    }

    /// Deletes a custom field with its values. Whether there was one.
    pub fn remove_field(&self, id: &str) -> bool {
        self.shared.world().records.remove_field(id, Timestamp::now())
    }

    /// Lets search see everything written so far.
    pub fn index_now(&self) {
        self.shared.world().records.index.apply_all();
    }

    /// Adds a fault to the script. Faults that make no sense, such as a status 99, count as a 500.
    pub fn fault(&self, fault: Fault) {
        self.shared.world().faults.add(fault);
    }

    /// Forgets all faults.
    pub fn clear_faults(&self) {
        self.shared.world().faults.clear();
    }

    /// The last 100 000 requests to the API, oldest first, also those that were refused.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.world().requests.all().cloned().collect()
    }

    /// How many of those have this method and a path, below `/api/v1`, that begins so.
    pub fn request_count(&self, method: &str, path_prefix: &str) -> usize {
        call::count(self.shared.world().requests.all(), method, path_prefix)
    }

    /// Revokes the key and lets another one in.
    pub fn set_api_key(&self, key: &str) {
        key.clone_into(&mut self.shared.world().settings.api_key);
    }

    /// Changes the search lag of the writes to come.
    pub fn set_search_lag(&self, lag: Lag) {
        self.shared.world().records.search_lag = lag;
    }

    /// Changes the rate limits from the next request on.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.world().settings.limits = limits;
    }

    /// What a person at a terminal needs to know to use it.
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
            // Writing to a string can not fail.
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
             \x20 export CLOSE_SEARCH_LAG={lag}s          # how long the worker doubts what search does not show\n\
             \nLook inside:\n\
             \x20 curl {controls}/\n\
             \x20 curl {controls}/leads\n\
             \nMake trouble:\n\
             \x20 # the next three requests to create a lead meet a 503\n\
             \x20 curl {controls}/faults -d '{{\"method\": \"POST\", \"path\": \"/lead/\", \"times\": 3, \
             \"effect\": {{\"status\": {{\"code\": 503}}}}}}'\n\
             \x20 # one lead is created, but the answer is lost\n\
             \x20 curl {controls}/faults -d '{{\"method\": \"POST\", \"path\": \"/lead/\", \"times\": 1, \
             \"effect\": {{\"drop_connection\": {{\"when\": \"after_commit\"}}}}}}'\n\
             \x20 # a custom field appears, and is gone again\n\
             \x20 curl {controls}/fields -d '{{\"id\": \"cf_region\", \"name\": \"Region\", \
             \"type\": \"text\", \"owner\": \"lead\"}}'\n\
             \x20 curl -X DELETE {controls}/fields/cf_region\n\
             \x20 # search falls behind; the key is revoked; peace again\n\
             \x20 curl -X PUT {controls}/settings -d '{{\"search_lag\": \"1s..10s\"}}'\n\
             \x20 curl -X PUT {controls}/settings -d '{{\"api_key\": \"another\"}}'\n\
             \x20 curl -X DELETE {controls}/faults\n",
            key = world.settings.api_key,
            // With some time for the call.
            lag = world.settings.search_lag.longest().as_secs() + 1,
            lead = text_field(Owner::Lead),
            contact = text_field(Owner::Contact),
        );
        text
    }
}
