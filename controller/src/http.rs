//! The small HTTP server for the probes and for Prometheus.

use crate::context::Ctx;
use crate::events::first_few;
use crate::metrics::{Cache, Change, State, Why};
use crate::reason::Reason;
use crate::security;
use axum::Router;
use axum::extract;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use std::collections::BTreeMap;
use std::sync::Arc;
use tgb_aws::values::TARGET_STATES;
use tgb_process::server;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Serves `/livez`, `/readyz` and `/metrics`.
pub(crate) fn serve(ctx: Arc<Ctx>, listener: tokio::net::TcpListener) {
    let router = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Arc::clone(&ctx));
    let served = server::serve(listener, None, server::routed(router), CancellationToken::new());
    ctx.vital.keep_up("the server of probes and metrics".to_owned(), served);
}

/// `?verbose`
#[derive(Debug, serde::Deserialize)]
struct Verbose {
    verbose: Option<String>,
}

async fn readyz(
    extract::State(ctx): extract::State<Arc<Ctx>>,
    extract::Query(query): extract::Query<Verbose>,
) -> impl IntoResponse {
    let unready = ctx.unready();
    let code = if unready.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.verbose.is_none() {
        return (code, unready.unwrap_or("ok").to_owned());
    }
    let mut lines = vec![match unready {
        None => "[+] the caches are filled".to_owned(),
        Some(why) => format!("[-] {why}"),
    }];
    lines.push(if ctx.term.lasts() { "leading" } else { "standing by for the lease" }.to_owned());
    for ((kind, namespace), age) in ctx.watches().broken(Instant::now()) {
        let place = namespace.as_ref().map(|namespace| format!(" in {namespace}")).unwrap_or_default();
        lines.push(format!("the watch of {kind}{place} has been broken for {} s", age.as_secs()));
    }
    // As many bindings as fail for the same reason.
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for standing in ctx.standings().values() {
        *reasons.entry(standing.reason.unwrap_or(Reason::Pending).as_str()).or_default() += 1;
    }
    lines.extend(reasons.into_iter().map(|(reason, count)| format!("{count} bindings: {reason}")));
    let unreadable: Vec<String> = ctx.index().unreadable.keys().map(ToString::to_string).collect();
    if !unreadable.is_empty() {
        lines.push(format!("bindings that cannot be read: {}", first_few(&unreadable)));
    }
    (code, lines.join("\n") + "\n")
}

async fn metrics(extract::State(ctx): extract::State<Arc<Ctx>>) -> impl IntoResponse {
    fill_in(&ctx);
    match ctx.metrics.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(CONTENT_TYPE, kind)], text)
        }
        Err(error) => {
            let kind = "text/plain; charset=utf-8";
            (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, kind)], error.to_string())
        }
    }
}

/// Counts what the gauges show.
fn fill_in(ctx: &Ctx) {
    let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let metrics = &ctx.metrics;
    metrics.leader.set(i64::from(ctx.term.lasts()));
    let mut targets: BTreeMap<&str, usize> = TARGET_STATES.iter().map(|(_, word, _)| (*word, 0)).collect();
    targets.insert("missing", 0);
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::from([(Reason::Reconciled.as_str(), 0)]);
    let (mut register, mut deregister, mut without_gate) = (0, 0, 0);
    for standing in ctx.standings().values() {
        for (state, count) in &standing.targets {
            *targets.entry(state).or_default() += count;
        }
        *reasons.entry(standing.reason.unwrap_or(Reason::Pending).as_str()).or_default() += 1;
        register += standing.planned.0;
        deregister += standing.planned.1;
        without_gate += standing.pods_without_gate;
    }
    for (state, count) in targets {
        metrics.targets.get_or_create(&State { state }).set(number(count));
    }
    metrics.bindings.clear();
    for (reason, count) in reasons {
        metrics.bindings.get_or_create(&Why { reason }).set(number(count));
    }
    metrics.planned.get_or_create(&Change { change: "register" }).set(number(register));
    metrics.planned.get_or_create(&Change { change: "deregister" }).set(number(deregister));
    metrics.pods_without_gate.set(number(without_gate));
    let waiting = ctx.workers().values().filter(|wake| wake.is_changed()).count();
    metrics.queue_depth.set(number(waiting));
    metrics.stale_rules.set(number(security::stale_rules(ctx)));
    metrics.unreadable_bindings.set(number(ctx.index().unreadable.len()));

    let caches = {
        let index = ctx.index();
        [
            ("bindings", index.bindings().len()),
            ("services", index.services().count()),
            ("endpointslices", index.slice_keys().len()),
            ("pods", index.pods().count()),
            ("nodes", index.nodes.len()),
            ("namespaces", index.namespaces.len()),
        ]
    };
    let (watches, now) = (ctx.watches(), Instant::now());
    for (cache, count) in caches {
        metrics.cache_objects.get_or_create(&Cache { cache }).set(number(count));
        let ages = watches.broken(now).filter(|((kind, _), _)| *kind == cache).map(|(_, age)| age);
        let age = ages.max().unwrap_or_default().as_secs_f64();
        metrics.cache_age.get_or_create(&Cache { cache }).set(age);
    }
}
