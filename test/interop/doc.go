// Package interop runs programs that we did not write through the mesh, unchanged: gRPC's own interop client and server, curl, a WebSocket
// client, redis-cli and psql. Two clusters, with trust domains and networks of their own, are joined; every workload has a network namespace.
// The programs know names (payments.shop.svc.clusterset.local) and nothing else: the sidecar's DNS answers, the kernel's rules lead the
// connections to it, a gateway passes them on, sealed.
//
//	west │ client: app ─► DNS, capture ─► sidecar ═══╪═══► gateway ═══► sidecar ─► app  (one or two) │ east
//
// And a program in Python, which gets its identity from the Workload API by the SPIFFE project's client (python/), and Envoy, which gets it by
// SDS.
//
// `make interop` runs it. It is a module of its own, so that nobody else needs gRPC's test programs.
package interop
