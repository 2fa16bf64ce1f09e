// Package xdsgen turns a view of the mesh into xDS resources: (view, viewer, type URL, name) → resource.
//
//	Clusterset ─► View ─┬─► Levels, Routes ─► hanse explain
//	                    └─► Resource ─► discovery/xdsserver ─► proxies, gRPC clients
//
// It is pure: equal views and viewers give the same bytes, and a resource's version is the hash of its bytes, so that what
// did not change is not sent again. docs/xds.md says which resource carries what. Nothing here does I/O, logs or keeps state;
// a View is immutable and safe for concurrent use.
package xdsgen
