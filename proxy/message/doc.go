// Package message holds HTTP messages as all codecs of the data path yield and take them: heads, fields, and the exchange of a
// request and its response.
//
//	proxy/http1, proxy/http2 ─► ServerStream ─► sidecar ─► ClientStream ─► proxy/http1, proxy/http2, proxy/hop
//
// Whatever the wire, a message means the same (RFC 9110):
//
//   - Field names are lower case. Fields hold neither what frames a message (content-length, transfer-encoding), nor what concerns one
//     connection (connection, keep-alive, upgrade …, RFC 9110 §7.6.1), nor host, nor expect: codecs read and write these themselves,
//     from Length, Authority and Protocol. "te" is there only as "trailers".
//   - An upgrade (HTTP/1.1 Upgrade, extended CONNECT of RFC 8441) is a Request with a Protocol; a peer that switched answers with
//     Status 101, also on HTTP/2, where the wire says 200. After that, and after a 2xx to CONNECT, bodies are raw bytes both ways, and End is
//     half-closing.
//   - A body that ends before its Length, and trailers or fields that no codec may pass on, are faults of their sender and end as an Error.
//
// Strings of heads stay valid for ever; Requests, Responses and Fields until the exchange is over.
package message
