//! 1,000 target groups of 1,000 targets, over HTTP: how long an answer takes, how many come per second, what it needs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may say what it means"
)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use awsim::{Cluster, Options, Server};

const ACCOUNT: &str = "111122223333";

/// A connection that speaks the query protocol.
struct Client(TcpStream);

impl Client {
    fn new(server: &Server) -> Self {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    fn call(&mut self, form: &str) -> (u16, Vec<u8>) {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: x\r\nAuthorization: AWS4-HMAC-SHA256 Credential={ACCOUNT}/20261124/us-west-2/elasticloadbalancing/aws4_request\r\nContent-Length: {}\r\n\r\n{form}",
            form.len()
        );
        self.0.write_all(request.as_bytes()).unwrap();
        let (mut got, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            let n = self.0.read(&mut buffer).unwrap();
            assert!(n > 0, "the connection was closed");
            got.extend_from_slice(&buffer[..n]);
            let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&got[..end]).to_ascii_lowercase();
            let length: usize = head
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "))
                .and_then(|l| l.parse().ok())
                .unwrap();
            while got.len() < end + 4 + length {
                let n = self.0.read(&mut buffer).unwrap();
                got.extend_from_slice(&buffer[..n]);
            }
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            return (status, got.split_off(end + 4));
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn resident_mb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0) / 1024
}

#[test]
fn a_million_targets_fit_in_a_gigabyte_and_answers_stay_fast() {
    let server = Server::start(Options::fast()).unwrap();
    let vpc = Cluster::default().vpc;
    server.seed(ACCOUNT, "us-west-2", |aws| aws.seed_cluster(&Cluster::default()));
    let mut client = Client::new(&server);
    let mut arns = Vec::new();
    for n in 0..1_000 {
        let form = format!(
            "Action=CreateTargetGroup&Version=2015-12-01&Name=g{n}&Protocol=HTTP&Port=80&VpcId={vpc}&TargetType=ip"
        );
        let (status, body) = client.call(&form);
        assert_eq!(status, 200);
        let body = String::from_utf8(body).unwrap();
        let arn = body.split("<TargetGroupArn>").nth(1).unwrap().split('<').next().unwrap();
        arns.push(arn.to_owned());
    }
    let mut registers = Vec::new();
    for arn in &arns {
        for part in 0..5 {
            let mut form = format!("Action=RegisterTargets&Version=2015-12-01&TargetGroupArn={arn}");
            for n in 0..200 {
                let at = part * 200 + n;
                form.push_str(&format!(
                    "&Targets.member.{}.Id=10.244.{}.{}&Targets.member.{}.Port=8080",
                    n + 1,
                    at / 250,
                    at % 250,
                    n + 1
                ));
            }
            let began = Instant::now();
            assert_eq!(client.call(&form).0, 200);
            registers.push(began.elapsed());
        }
    }
    let memory = resident_mb();
    let time = |client: &mut Client, form: &str| {
        median(
            (0..200)
                .map(|_| {
                    let began = Instant::now();
                    assert_eq!(client.call(form).0, 200);
                    began.elapsed()
                })
                .collect(),
        )
    };
    let one =
        format!("Action=DescribeTargetGroups&Version=2015-12-01&TargetGroupArns.member.1={}", arns[500]);
    let health = format!("Action=DescribeTargetHealth&Version=2015-12-01&TargetGroupArn={}", arns[500]);
    let (group, health) = (time(&mut client, &one), time(&mut client, &health));
    let began = Instant::now();
    let calls = 5_000u32;
    for _ in 0..calls {
        client.call(&one);
    }
    let rate = f64::from(calls) / began.elapsed().as_secs_f64();
    println!(
        "1,000 x 1,000 targets: {memory} MB; register 200: {:?}; one group: {group:?}; health of 1,000: {health:?}; {rate:.0} requests/s on one connection",
        median(registers)
    );
    assert!(memory < 1_024, "{memory} MB");
    // generous: other tests may have the machine
    assert!(group < Duration::from_millis(5), "{group:?}");
    assert!(health < Duration::from_millis(20), "{health:?}");
}
