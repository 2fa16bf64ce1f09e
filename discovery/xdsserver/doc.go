// Package xdsserver serves a View to proxies and gRPC clients: ADS in both protocol variants, and takes their load reports.
//
//	Clusterset ─► SetView ─► Run ─► View and cache ─┬─► one goroutine per stream ─► proxy
//	                                                └─► …
//	load reports (LRS) ─► Config.OnReport
//
// A stream makes what it needs when it is asked or when a View changed something that it has subscribed to; streams of one
// class of viewer share the result. A stream that does not read blocks nobody else. What is sent is what differs by
// content hash. An unknown name is answered at once. A rejected resource is noted, and the client keeps its last good one.
//
// Who a caller is, is its SVID: only members of the own trust domain are served, a gateway's table goes to
// spiffe://<td>/hanse/gateway alone, an inbound Listener to the SPIFFE ID of the endpoint at its address alone. A stream ends
// when the bundle that verified it does not verify it any more.
package xdsserver
