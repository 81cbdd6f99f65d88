//! The settings of the whole process: HTTP, the operator's page, logs and traces.

use std::net::SocketAddr;

use secrecy::SecretString;
use toml::{Table, Value};

use crate::config::problems::Problem;
use crate::config::raw::{self, setting};
use crate::config::reader::Reader;
use crate::config::settings::LogFormat;
use crate::http::admin;
use crate::telemetry::otel;

pub(super) struct Process {
    pub(super) http_addr: SocketAddr,
    pub(super) page: Option<admin::Settings>,
    pub(super) log_format: LogFormat,
    pub(super) traces: otel::Settings,
}

/// Checks every key. Returns `None` if there is a problem.
pub(super) fn read(settings: Table, problems: &mut Vec<Problem>) -> Option<Process> {
    let raw: raw::Process = match settings.try_into() {
        Ok(raw) => raw,
        Err(error) => {
            problems.push(Problem::bug(&error));
            return None;
        }
    };
    let mut reader = Reader { problems };
    let http_addr = reader.parsed(
        setting!(raw, http.addr),
        "address",
        "an IP address and a port like `127.0.0.1:9090`",
        |text| text.parse().ok(),
    );
    let page = page(&raw, http_addr, &mut reader);
    let log_format = reader.parsed(
        setting!(raw, log.format),
        "log format",
        "`auto`, `text` or `json`",
        |text| match text {
            "auto" => Some(LogFormat::Auto),
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        },
    );
    let traces = traces(&raw, &mut reader);
    Some(Process {
        http_addr: http_addr?,
        page: raw.http.page.then_some(page?),
        log_format: log_format?,
        traces: traces?,
    })
}

/// The settings of the operator's page. They are checked even if the page is off.
fn page(raw: &raw::Process, addr: Option<SocketAddr>, reader: &mut Reader<'_>) -> Option<admin::Settings> {
    /// Long enough that it cannot be guessed.
    const MIN_LENGTH: usize = 16;
    let token = setting!(raw, http.page_token);
    let is_exposed = addr.is_some_and(|addr| !addr.ip().is_loopback());
    let text = token.text().to_owned();
    if !text.is_empty() && text.len() < MIN_LENGTH {
        let message = format!(
            "too short; use at least {MIN_LENGTH} characters, for example from `openssl rand -hex {MIN_LENGTH}`"
        );
        reader.problem(token.key, message);
    } else if raw.http.page && is_exposed && text.is_empty() {
        let message = format!(
            "not set, but other machines can reach the page at `http.addr`; set a token, for example from \
             `openssl rand -hex {MIN_LENGTH}`, or set `http.addr` (HTTP_ADDR) to `127.0.0.1:9090`"
        );
        reader.problem(token.key, message);
    }
    let hosts = page_hosts(raw, reader)?;
    let token = (!text.is_empty()).then(|| SecretString::from(text));
    Some(admin::Settings { token, hosts })
}

fn page_hosts(raw: &raw::Process, reader: &mut Reader<'_>) -> Option<Vec<String>> {
    let setting = setting!(raw, http.page_hosts);
    let host = |item: &Value| {
        let name = item.as_str()?.trim().to_ascii_lowercase();
        // Without scheme, port and path.
        url::Host::parse(&name).ok().map(|host| host.to_string()).filter(|host| *host == name)
    };
    let hosts: Option<Vec<String>> = setting.value.iter().map(host).collect();
    if hosts.is_none() {
        let message = "must be a list of host names or addresses without scheme and port, like `[\"sync.example.com\"]`";
        reader.problem(setting.key, message);
    }
    hosts
}

fn traces(raw: &raw::Process, reader: &mut Reader<'_>) -> Option<otel::Settings> {
    let endpoint = setting!(raw, otel.exporter.otlp.endpoint);
    let endpoint = if endpoint.text().is_empty() {
        Some(None)
    } else if endpoint.text().contains(['@', '?', '#']) {
        // The URL is shown in logs, so the message must not repeat it.
        let message = "must be a URL without credentials and parameters, like `http://localhost:4318`; \
                       put credentials into `otel.exporter.otlp.headers`";
        reader.problem(endpoint.key, message);
        None
    } else {
        reader.parsed(endpoint, "URL", "for example `http://localhost:4318`", otel::endpoint).map(Some)
    };
    let expected = "for example `api-key=secret,x-tenant=crm`, with special characters written like `%20`";
    let headers =
        reader.parsed(setting!(raw, otel.exporter.otlp.headers), "list of headers", expected, otel::headers);
    let service =
        reader.parsed(setting!(raw, otel.service.name), "name", "for example `close-sync`", |text| {
            (!text.is_empty()).then(|| text.to_owned())
        });
    let ratio = setting!(raw, otel.traces.sampler.arg);
    let share = *ratio.value;
    if !(0.0..=1.0).contains(&share) {
        reader.problem(ratio.key, format!("{share} is not between 0 and 1"));
    }
    Some(otel::Settings { endpoint: endpoint?, headers: headers?, service: service?, ratio: share })
}
