//! The operator's page, over plain HTTP. `slow/browser.rs` opens it in a browser.

mod auth;
mod dead_letters;
mod status;
mod test_event;
mod untrusted_input;

use reqwest::header::{COOKIE, HeaderMap, LOCATION, SET_COOKIE};
use reqwest::{Client, Response, StatusCode, redirect};

use crate::support::{Bench, Worker};

pub(crate) const TOKEN: &str = "a-token-of-32-characters-or-more";

/// A bench with the page enabled and no token.
async fn without_token() -> Bench {
    Bench::new().await.set("HTTP_PAGE", "true")
}

/// A bench with the page enabled and protected by [`TOKEN`].
pub(crate) async fn with_token() -> Bench {
    without_token().await.set("HTTP_PAGE_TOKEN", TOKEN)
}

#[derive(Debug)]
struct Page {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Page {
    async fn of(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    /// The CSRF token of its forms.
    fn csrf_token(&self) -> &str {
        let (_, rest) =
            self.text.split_once(r#"name="csrf_token" value=""#).unwrap_or_else(|| panic!("{self:?}"));
        rest.split('"').next().unwrap()
    }

    fn header(&self, name: impl reqwest::header::AsHeaderName) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }

    #[track_caller]
    fn assert_has(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.text.contains(part), "no {part} in {self:#?}");
        }
    }

    #[track_caller]
    fn assert_lacks(&self, parts: &[&str]) {
        for part in parts {
            assert!(!self.text.contains(part), "{part} in {self:#?}");
        }
    }
}

/// An HTTP client with the cookie of a session.
struct Browser {
    base: String,
    http: Client,
    cookie: Option<String>,
}

impl Browser {
    async fn of(worker: &Worker) -> Self {
        let http = Client::builder().redirect(redirect::Policy::none()).build().unwrap();
        Self { base: worker.base().await, http, cookie: None }
    }

    /// A signed-in client.
    async fn signed_in(worker: &Worker) -> Self {
        let mut browser = Self::of(worker).await;
        let page = browser.sign_in(TOKEN, "Ada", "/page/-").await;
        assert_eq!((page.status, page.header(LOCATION)), (StatusCode::SEE_OTHER, "/page/-"), "{page:#?}");
        browser
    }

    async fn sign_in(&mut self, token: &str, who: &str, to: &str) -> Page {
        let fields = [("token", token), ("who", who), ("to", to)];
        let page = self.submit("/page/sign-in", "/page/sign-in", &fields).await;
        if let Some((cookie, _)) = page.header(SET_COOKIE).split_once(';') {
            self.cookie = Some(cookie.to_owned());
        }
        page
    }

    async fn get(&self, path: &str) -> Page {
        self.get_with(path, &[]).await
    }

    async fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Page {
        self.send(self.http.get(format!("{}{path}", self.base)), headers).await
    }

    /// Posts form fields without a CSRF token.
    async fn post(&self, path: &str, fields: &[(&str, &str)], headers: &[(&str, &str)]) -> Page {
        let form = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        let request = self.http.post(format!("{}{path}", self.base)).body(form);
        let kind = ("content-type", "application/x-www-form-urlencoded");
        self.send(request, &[&[kind], headers].concat()).await
    }

    /// Submits the form of a page.
    async fn submit(&self, page: &str, to: &str, fields: &[(&str, &str)]) -> Page {
        let page = self.get(page).await;
        self.post(to, &[&[("csrf_token", page.csrf_token())], fields].concat(), &[]).await
    }

    async fn send(&self, request: reqwest::RequestBuilder, headers: &[(&str, &str)]) -> Page {
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = match &self.cookie {
            Some(cookie) => request.header(COOKIE, cookie),
            None => request,
        };
        Page::of(request.send().await.unwrap()).await
    }
}
