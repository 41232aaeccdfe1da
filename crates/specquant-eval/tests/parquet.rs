//! Task data in parquet, and from a hub.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use specquant_eval::{Hub, Task, TaskData};

/// Two rows of PIQA.
fn piqa() -> Vec<u8> {
    let schema = "message schema { required binary goal (UTF8); required binary sol1 (UTF8); required binary sol2 (UTF8); \
                  required int64 label; }";
    let mut bytes = Vec::new();
    let mut writer =
        SerializedFileWriter::new(&mut bytes, Arc::new(parse_message_type(schema).unwrap()), Arc::default())
            .unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in [["Öl?", "b"], ["c", "d"], ["e", "f"]] {
        let mut out = group.next_column().unwrap().unwrap();
        let values = column.map(ByteArray::from);
        out.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        out.close().unwrap();
    }
    let mut out = group.next_column().unwrap().unwrap();
    out.typed::<Int64Type>().write_batch(&[1, 0], None, None).unwrap();
    out.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn missing_data_come_from_the_hub_as_parquet() {
    let dir = tempfile::tempdir().unwrap();
    let task = Task::named("piqa").unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", server.local_addr().unwrap());
    let hub = Hub { endpoint, token: Some("secret".into()) };
    let served = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for (status, body) in [("404 Not Found", Vec::new()), ("200 OK", piqa())] {
            let (mut stream, _) = server.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            requests.push(String::from_utf8(request).unwrap());
            let head =
                format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
        }
        requests
    });
    let error = task.download(dir.path(), &hub).unwrap_err().to_string();
    assert!(
        error.contains("404") && error.contains("baber/piqa") && error.contains("HF_ENDPOINT"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    task.download(dir.path(), &hub).unwrap();
    let requests = served.join().unwrap();
    let wanted = "GET /datasets/baber/piqa/resolve/refs%2Fconvert%2Fparquet/default/validation/0000.parquet ";
    assert!(requests.iter().all(|r| r.starts_with(wanted) && r.contains("Bearer secret")), "{requests:?}");

    let data = TaskData::read(task, dir.path(), 0).unwrap();
    assert_eq!((data.available, data.lines.clone(), data.documents[0].gold), (2, vec![1, 2], 1));
    assert_eq!(data.documents[0].requests[1].context, "Question: Öl?\nAnswer:");
    assert_eq!(data.documents[1].requests[1].continuation, " f");
    assert_eq!(TaskData::read(task, dir.path(), 1).unwrap().documents.len(), 1);

    // jsonl goes first; a damaged file is named.
    std::fs::write(dir.path().join("piqa.parquet"), &piqa()[..50]).unwrap();
    let error = TaskData::read(task, dir.path(), 0).unwrap_err().to_string();
    assert!(error.contains("piqa.parquet") && error.contains("parquet:"), "{error}");
    let row = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    std::fs::write(dir.path().join("piqa.jsonl"), row).unwrap();
    assert_eq!(TaskData::read(task, dir.path(), 0).unwrap().available, 1);
    assert!(task.fetch_command(dir.path()).contains("--download"));
}
