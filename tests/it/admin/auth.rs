//! Sign-in, and protection against other sites.

use reqwest::StatusCode;
use reqwest::header::{LOCATION, SET_COOKIE};

use super::{Browser, Page, TOKEN, with_token, without_token};
use crate::support::Bench;

/// The form for a test event, which changes nothing.
const TEST: &str = "/page/-/test";

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_off_by_default() {
    let worker = Bench::new().await.set("HTTP_PAGE_TOKEN", TOKEN).worker().await;
    let browser = Browser::of(&worker).await;
    for path in ["/page", "/page/-", "/page/sign-in", "/page/style.css", "/page/-/test"] {
        assert_eq!(browser.get(path).await.status, StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(browser.get("/healthz").await.status, StatusCode::OK);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_has_security_headers() {
    let worker = without_token().await.worker().await;
    let browser = Browser::of(&worker).await;
    for path in ["/page", "/page/-", "/page/style.css", "/page/nowhere", "/page/-/test/nowhere"] {
        let page = browser.get(path).await;
        let csp = page.header("content-security-policy");
        assert!(csp.starts_with("default-src 'none'; style-src 'self'; form-action 'self'"), "{path}: {csp}");
        assert!(csp.ends_with("base-uri 'none'; frame-ancestors 'none'"), "{path}: {csp}");
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "same-origin"),
            ("cache-control", "no-store"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(page.header(name), value, "{path}: {name}");
        }
        page.assert_lacks(&["<script", " onclick", " style="]);
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_token_only_the_sign_in_form_is_shown() {
    let worker = with_token().await.worker().await;
    let mut browser = Browser::of(&worker).await;
    for path in ["/page", "/page/-", TEST, "/page/nowhere"] {
        let page = browser.get(path).await;
        assert_eq!((page.status, page.header("www-authenticate")), (StatusCode::UNAUTHORIZED, "Bearer"));
        page.assert_has(&["<h1>Sign in", &format!(r#"name="to" value="{path}""#)]);
        page.assert_lacks(&["Backlog", TOKEN]);
    }
    for cookie in ["close_sync_page=", "close_sync_page=0123456789abcdef0123456789abcdef"] {
        browser.cookie = Some(cookie.to_owned());
        assert_eq!(browser.get("/page/-").await.status, StatusCode::UNAUTHORIZED, "{cookie}");
    }
    browser.cookie = None;
    let refused = browser.post(TEST, &[("event", "{}")], &[]).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);

    let wrong = browser.sign_in("a-token-of-32-characters-or-less", "Ada", "/page/-").await;
    assert_eq!((wrong.status, wrong.header(SET_COOKIE)), (StatusCode::UNAUTHORIZED, ""));
    wrong.assert_has(&["Wrong token"]);
    let bearer = [("authorization", "Bearer a-token-of-32-characters-or-less")];
    assert_eq!(browser.get_with("/page/-", &bearer).await.status, StatusCode::UNAUTHORIZED);
    for who in ["", " ", "two\nlines", "Ada\u{202e}", &"x".repeat(61)] {
        let nameless = browser.sign_in(TOKEN, who, "/page/-").await;
        assert_eq!(nameless.status, StatusCode::UNAUTHORIZED, "{who:?}");
        nameless.assert_has(&["Enter your name for the log"]);
    }
    // A wrong bearer token does not replace the CSRF token.
    let fields = [("token", TOKEN), ("who", "Ada")];
    assert_eq!(browser.post("/page/sign-in", &fields, &bearer).await.status, StatusCode::FORBIDDEN);
    assert_eq!(worker.audited(), [["sign-in refused", "nobody", ""]], "one line a minute");
    assert!(!worker.log().contains("characters-or-"), "{}", worker.log());
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_signs_in_and_out() {
    let worker = with_token().await.worker().await;
    let mut browser = Browser::of(&worker).await;
    let page = browser.sign_in(TOKEN, " Ada ", "/page/-/test").await;
    assert_eq!((page.status, page.header(LOCATION)), (StatusCode::SEE_OTHER, TEST));
    let cookie = page.header(SET_COOKIE);
    for part in ["; Path=/page", "; HttpOnly", "; SameSite=Strict", "; Max-Age=43200"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains(TOKEN));
    let live = browser.get("/page/-").await;
    assert_eq!(live.status, StatusCode::OK);
    live.assert_has(&["<span>Ada</span>", "Sign out"]);
    // A second sign-in, through a TLS proxy, ends the first session.
    let before = browser.cookie.clone();
    let form = browser.get("/page/sign-in").await;
    let (fields, origin) = (
        [("csrf_token", form.csrf_token()), ("token", TOKEN), ("who", "Ada")],
        browser.base.replace("http:", "https:"),
    );
    let again = browser.post("/page/sign-in", &fields, &[("origin", &origin)]).await;
    assert!(again.header(SET_COOKIE).ends_with("; Secure") && !cookie.contains("Secure"), "{again:#?}");
    assert_eq!(browser.get("/page/-").await.status, StatusCode::UNAUTHORIZED);
    let cookie = again.header(SET_COOKIE).split(';').next().unwrap();
    browser.cookie = Some(cookie.to_owned());
    assert_ne!(browser.cookie, before);
    let before = browser.cookie.clone();
    let out = browser.submit("/page/-", "/page/sign-out", &[]).await;
    assert!(out.status == StatusCode::SEE_OTHER && out.header(SET_COOKIE).contains("Max-Age=0"), "{out:#?}");
    browser.cookie = before;
    assert_eq!(browser.get("/page/-").await.status, StatusCode::UNAUTHORIZED, "the session is over");
    assert_eq!(worker.audited(), [["sign-in", "Ada", ""], ["sign-in", "Ada", ""], ["sign-out", "Ada", ""]]);
    assert!(worker.log().contains(r#""from":"127.0.0.1""#), "{}", worker.log());

    // Scripts send the bearer token instead.
    browser.cookie = None;
    let bearer = [("authorization", format!("Bearer {TOKEN}"))];
    let bearer = bearer.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(browser.get_with("/page/-", &bearer).await.status, StatusCode::OK);
    assert_eq!(browser.post(TEST, &[("event", "{}")], &bearer).await.status, StatusCode::OK);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sign_in_redirects_only_to_the_page() {
    let worker = with_token().await.worker().await;
    let mut browser = Browser::of(&worker).await;
    let cases = [
        ("https://evil.example/", "/page"),
        ("//evil.example/page/", "/page"),
        ("/page.evil.example", "/page"),
        ("/page/-\r\nset-cookie: a=b", "/page"),
        ("/page/\u{e9}", "/page"),
        ("/page/-/test", "/page/-/test"),
    ];
    for (to, location) in cases {
        let page = browser.sign_in(TOKEN, "Ada", to).await;
        assert_eq!((page.status, page.header(LOCATION)), (StatusCode::SEE_OTHER, location), "{to:?}");
        assert_eq!(page.headers.get_all(SET_COOKIE).iter().count(), 1);
    }
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_of_another_site_is_rejected() {
    for bench in [without_token().await, with_token().await] {
        let worker = bench.worker().await;
        let has_token = worker.base().await.is_empty() || bench.environment().contains_key("HTTP_PAGE_TOKEN");
        let browser = if has_token { Browser::signed_in(&worker).await } else { Browser::of(&worker).await };
        let own = browser.get(TEST).await;
        let event = ("event", "{}");
        assert_eq!(
            browser.post(TEST, &[("csrf_token", own.csrf_token()), event], &[]).await.status,
            StatusCode::OK
        );
        let signed_out = Browser::of(&worker).await.get("/page/sign-in").await;
        let mut wrong = vec!["", "0123456789abcdef0123456789abcdef"];
        // A session does not accept the CSRF token of visitors without one.
        wrong.extend(has_token.then(|| signed_out.csrf_token()));
        for csrf_token in wrong {
            let page = browser.post(TEST, &[("csrf_token", csrf_token), event], &[]).await;
            assert_eq!(page.status, StatusCode::FORBIDDEN, "{csrf_token}");
        }
        assert_eq!(browser.post(TEST, &[event], &[]).await.status, StatusCode::FORBIDDEN);
        // Another site is rejected even with the right CSRF token.
        let host = browser.base.strip_prefix("http://").unwrap().to_owned();
        let good = [
            vec![("origin", browser.base.as_str()), ("sec-fetch-site", "same-origin")],
            vec![("sec-fetch-site", "none")],
        ];
        for headers in good {
            let page = browser.post(TEST, &[("csrf_token", own.csrf_token()), event], &headers).await;
            assert_eq!(page.status, StatusCode::OK, "{headers:?}");
        }
        let (port, path) = (format!("http://127.0.0.1:{}", 1), format!("http://{host}.evil.example"));
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("origin", "null"),
            ("origin", "https://evil.example"),
            ("origin", &port),
            ("origin", &path),
        ] {
            let page = browser.post(TEST, &[("csrf_token", own.csrf_token()), event], &[(name, value)]).await;
            assert_eq!(page.status, StatusCode::FORBIDDEN, "{name}: {value}");
            page.assert_has(&["Another site sent this request"]);
        }
        worker.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_site_may_only_link_to_the_page() {
    let worker = without_token().await.worker().await;
    let browser = Browser::of(&worker).await;
    let from = |mode: &'static str, to: &'static str| {
        [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", mode), ("sec-fetch-dest", to)]
    };
    let status =
        async |headers: [(&'static str, &'static str); 3]| browser.get_with("/page/-", &headers).await.status;
    assert_eq!(status(from("navigate", "document")).await, StatusCode::OK);
    assert_eq!(status(from("navigate", "iframe")).await, StatusCode::FORBIDDEN);
    assert_eq!(status(from("no-cors", "image")).await, StatusCode::FORBIDDEN);
    assert_eq!(status(from("cors", "empty")).await, StatusCode::FORBIDDEN);
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_host_name_is_rejected() {
    let worker = without_token().await.set("HTTP_PAGE_HOSTS", "[\"sync.example.test\"]").worker().await;
    let browser = Browser::of(&worker).await;
    let get = async |host: &str| -> Page { browser.get_with("/page/-", &[("host", host)]).await };
    for ours in
        ["localhost", "LOCALHOST:9090", "127.0.0.1", "127.0.0.2:80", "[::1]:9090", "sync.example.test:8443"]
    {
        assert_eq!(get(ours).await.status, StatusCode::OK, "{ours}");
    }
    for theirs in [
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "sync.example.test.evil.example",
        "127.0.0.1.nip.io",
    ] {
        let page = get(theirs).await;
        assert_eq!(page.status, StatusCode::MISDIRECTED_REQUEST, "{theirs}");
        page.assert_has(&["http.page_hosts"]);
    }
    // Prometheus may use any name.
    assert_eq!(browser.get_with("/metrics", &[("host", "worker.internal")]).await.status, StatusCode::OK);
    worker.terminate().await;
}

/// Guesses the token this many times at once, and returns how many guesses were compared.
async fn guess(browser: &Browser, guesses: usize) -> usize {
    let bearer = [("authorization", "Bearer a-token-of-32-characters-or-less")];
    let pages = (0..guesses).map(|_| browser.get_with("/page/-", &bearer));
    let pages = futures_util::future::join_all(pages).await;
    for page in &pages {
        match page.status {
            StatusCode::UNAUTHORIZED => {}
            StatusCode::TOO_MANY_REQUESTS => {
                assert!(page.header("retry-after").parse::<u64>().unwrap() > 0, "{page:?}");
            }
            other => panic!("{other}"),
        }
    }
    pages.iter().filter(|page| page.status == StatusCode::UNAUTHORIZED).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_tokens_block_further_guesses_and_not_sessions() {
    let worker = with_token().await.worker().await;
    let operator = Browser::signed_in(&worker).await;
    let browser = Browser::of(&worker).await;
    // An address may have 128 connections.
    let mut compared = 0;
    for _ in 0..6 {
        compared += guess(&browser, 50).await;
    }
    assert!((5..20).contains(&compared), "{compared}");
    assert_eq!(operator.get("/page/-").await.status, StatusCode::OK, "an open session goes on");
    let metrics = worker.metrics().await;
    let refused =
        |reason: &str| metrics.count(&format!("page_sign_ins_refused_total{{reason=\"{reason}\"}}"));
    assert_eq!(refused("wrong_token") as usize, compared);
    assert_eq!(refused("wrong_token") + refused("throttled"), 300);
    worker.terminate().await;
    let log = worker.log();
    let lines: Vec<serde_json::Value> =
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let lines: Vec<_> = lines.iter().filter(|line| line["audit"] == "sign-in refused").collect();
    // One at once, one with the rest. A slow machine may take more than a minute.
    assert!((2..5).contains(&lines.len()), "{lines:?}");
    assert_eq!(lines.iter().map(|line| line["guesses"].as_u64().unwrap()).sum::<u64>(), 300);
}
