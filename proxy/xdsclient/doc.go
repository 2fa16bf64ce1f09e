// Package xdsclient follows the control plane: it asks for what this proxy uses, decodes it into a proxy.Table, and reports load.
//
//	Resolve ─► wanted names ─► delta ADS ─► decode ─► store ─► proxy.Table ─► OnTable, Table, Changed
//	                               ▲           │        └─► StateDir
//	                               └── NACK ◄──┘
//	Config.Load ─► LRS
//
// A Listener becomes visible once the Clusters and endpoints that it leads to have been answered, so a Table never routes to what has
// not come yet. What does not decode is rejected by name and field, and the last good one stays in force. Without a control plane the
// client goes on with what it has, also after a restart: resources are kept in StateDir. Drills are not kept, they must heal.
//
// Client.Run owns every goroutine here. The store is a state machine without I/O or clock of its own.
package xdsclient
