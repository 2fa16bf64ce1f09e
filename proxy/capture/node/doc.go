// Package node captures for Pods that may not do so themselves.
//
//	Pod                                       node
//	hanse-proxy capture wait --rules … ◄────── Agent: finds it in /proc, enters its network namespace, installs the rules
//	      │ its own connections are captured
//	      ▼
//	ends; the sidecar and the application start
//
// A process can ask for its own network namespace only, once, and not for the node's: nobody gains by asking, and an application that asks later,
// for other rules, is not heard. The Agent asks no API server, and no Pod mounts anything of the node.
package node
