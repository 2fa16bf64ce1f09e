// Package proxy is the vocabulary of the data path: the immutable Table that a sidecar or gateway obeys, and the matching
// of a request against it.
//
//	xDS ─► proxy/xdsclient ─► Table ─► proxy/sidecar, proxy/gateway
//	                            │
//	                            └─► proxy/balance picks the endpoint
//
// A Table is never changed after it was handed out. A proxy swaps the pointer; a request keeps the Table that it began with.
// The package imports nothing of this module.
package proxy
