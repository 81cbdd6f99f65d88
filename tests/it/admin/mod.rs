//! The operator's page, by plain HTTP: no browser, no script.

mod auth;
mod browser;
mod dead_letters;
mod status;
mod test_event;
mod untrusted_input;

use reqwest::header::{COOKIE, HeaderMap, LOCATION, SET_COOKIE};
use reqwest::{Client, Response, StatusCode, redirect};

use crate::support::{Bench, Worker};

/// The token of tests that have one.
const TOKEN: &str = "a-token-of-32-characters-or-more";

/// With the page, for whoever comes.
async fn open() -> Bench {
    Bench::new().await.set("HTTP_PAGE", "true")
}

/// With the page, for those who know the token.
async fn closed() -> Bench {
    open().await.set("HTTP_PAGE_TOKEN", TOKEN)
}

/// A page as it came.
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

    /// What its forms carry.
    fn seal(&self) -> &str {
        let (_, rest) = self.text.split_once(r#"name="seal" value=""#).unwrap_or_else(|| panic!("{self:?}"));
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

/// Somebody who looks at pages.
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

    /// Who has signed in.
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

    /// Posts a form as it is.
    async fn post(&self, path: &str, fields: &[(&str, &str)], headers: &[(&str, &str)]) -> Page {
        let form = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        let request = self.http.post(format!("{}{path}", self.base)).body(form);
        let kind = ("content-type", "application/x-www-form-urlencoded");
        self.send(request, &[&[kind], headers].concat()).await
    }

    /// Fills in the form of a page, and sends it.
    async fn submit(&self, page: &str, to: &str, fields: &[(&str, &str)]) -> Page {
        let page = self.get(page).await;
        self.post(to, &[&[("seal", page.seal())], fields].concat(), &[]).await
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
