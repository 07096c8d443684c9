//! The small HTTP server for the probes and for Prometheus.

use crate::context::Ctx;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// Serves `/livez`, `/readyz` and `/metrics` for ever.
pub(crate) fn serve(ctx: Arc<Ctx>, listener: tokio::net::TcpListener) {
    let router = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(ctx);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the HTTP server broke off");
        }
    });
}

async fn readyz(State(ctx): State<Arc<Ctx>>) -> impl IntoResponse {
    match ctx.unready() {
        None => (StatusCode::OK, "ok"),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

async fn metrics(State(ctx): State<Arc<Ctx>>) -> impl IntoResponse {
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    {
        let index = ctx.index();
        ctx.metrics.bindings.set(count(index.bindings.len()));
        ctx.metrics.pods.set(count(index.pods.len()));
    }
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
