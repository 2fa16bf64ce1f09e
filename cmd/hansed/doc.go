// Hansed is the control plane of one cluster: it discovers services, issues SVIDs, joins the mesh, and programs proxies.
//
//	files, applied objects ─► catalog ─► Snapshot ─► mesh (federation) ─► Clusterset ─► xDS ─► proxies
//	ca, bundles, tokens ─► SPIRE Server API ─► agents
//	hanse ─► admin.Backend (controlPlane)
//
// controlplane.go joins the parts; each backend_*.go is one group of what hanse can ask for. Nothing is lost by a kill: what was
// acknowledged is on disk, and it starts from its mirror when no peer answers.
package main
