import { createRoot } from "react-dom/client";
import { Chat } from "./chat.js";

createRoot(document.querySelector("main")!).render(<Chat session={location.hash.slice(1)} />);
