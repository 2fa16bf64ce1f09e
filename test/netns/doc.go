// Package netns gives tests network namespaces, joined as they like, so that they can change rules of the kernel and use fixed ports
// without touching the machine or each other.
//
//	func TestX(t *testing.T) {
//		netns.Test(t, func(t *testing.T) {
//			a, b := netns.New(t), netns.New(t)
//			netns.Join(t, a, b, "10.0.0.1/24", "10.0.0.2/24")
//			ln, err := b.Listen("tcp", "10.0.0.2:80")
//			…
//		})
//	}
//
// Test runs itself again in a process of its own, in a user namespace too where there is no root. Where the kernel permits neither, the
// test is skipped, or fails if HANSE_NO_SKIP is set, as it is in CI.
package netns
